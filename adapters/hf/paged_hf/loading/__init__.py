"""From a path, a hub id or a live object to a model and its tokenizer."""
