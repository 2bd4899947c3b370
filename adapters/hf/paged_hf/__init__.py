"""Hugging Face models on paged-core."""
