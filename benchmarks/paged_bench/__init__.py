"""The A/B: the same requests through stock Hugging Face and through paged memory, side by side."""
