"""Kernels for paged K/V: reference, CPU, GPU."""
