"""A transformers cache over blocks."""
