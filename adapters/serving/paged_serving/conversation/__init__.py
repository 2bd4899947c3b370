"""Conversations as every protocol means them: what bodies are translated into, and events that answers are made of."""
