"""The tier of every causal language model of transformers, found by running them all."""
