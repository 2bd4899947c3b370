"""Chooses tokens from logits, reports their log-probabilities, and searches with beams."""
