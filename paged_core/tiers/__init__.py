"""Storage for K/V that the cache evicts: blocks are kept where there is more room, and loaded when they are needed
again."""
