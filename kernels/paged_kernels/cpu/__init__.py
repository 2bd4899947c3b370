"""Kernels compiled for the host's own vectors when they are first needed (numba), and packed products."""
