"""The operations of ``paged_kernels.reference`` compiled by Triton, for GPUs. ``launch`` has the launchers."""
