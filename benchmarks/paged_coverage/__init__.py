"""Which causal language models of transformers run on which tier: found out by running them all."""
