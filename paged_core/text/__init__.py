"""Text to token ids and back, stop strings, and the outputs that users get."""
