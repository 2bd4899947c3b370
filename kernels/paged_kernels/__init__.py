"""Operations on paged K/V memory, and elementwise operations around them.

``reference`` defines each operation in plain torch; ``cpu`` has the same operations compiled for the host, ``triton``
for GPUs. Importing this package imports none of them. It knows tensors and block tables, and no request, model or
engine.
"""
