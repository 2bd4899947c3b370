"""Decides which tokens are computed next and where they live. Integers only; standard library only."""
