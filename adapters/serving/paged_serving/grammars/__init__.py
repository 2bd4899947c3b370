"""Answers that must follow a grammar: written for llguidance, compiled first in a process that can be killed, compiled
here, enforced."""
