"""The loop and the parts around it: token ids in, token ids out."""
