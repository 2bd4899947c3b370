"""Taking a transformers model in: its twin, its facts, its attention."""
