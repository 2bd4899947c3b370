"""Operations on paged K/V memory, and the elementwise helpers around them.

``reference`` is the truth in plain torch; ``cpu`` the same operations compiled for the host. Importing this
package imports none of them. It knows tensors and block tables, and no request, model or engine.
"""
