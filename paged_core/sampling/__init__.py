"""Logits to tokens: what is drawn, what is told of it, and beams."""
