"""CPU kernels, compiled by numba for the host's own vector width when they are first needed, and packed products."""
