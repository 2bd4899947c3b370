"""Text in and out: token ids to text and back, stop strings, what users are given."""
