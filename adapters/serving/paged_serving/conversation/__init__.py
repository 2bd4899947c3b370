"""Conversations of any protocol: bodies are translated into them, and answers are made of their events."""
