"""Decides which tokens are computed next and which blocks hold their K/V. It knows integers and the standard library
only."""
