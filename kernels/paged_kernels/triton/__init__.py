"""The operations of ``paged_kernels.reference`` as Triton kernels, for GPUs. The launchers are in ``launch``."""
