"""One model on several processes: who they are, how they are started and ended, and what rank 0 has the others do.

Each process is a rank. Rank 0 is the caller's own: it has the engine, decides and samples. The others hold their shard
of the model and of its K/V, and compute what they are told.
"""
