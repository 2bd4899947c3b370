"""The loop, and what turns it: token ids in, token ids out."""
