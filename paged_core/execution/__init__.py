"""Computes what the scheduler decided. Torch only; takes no decision."""
