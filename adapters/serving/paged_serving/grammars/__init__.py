"""Answers that must follow a grammar: spelt for llguidance, tried where trying can be ended, compiled, followed."""
