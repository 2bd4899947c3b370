"""Hugging Face transformers models on paged memory."""
