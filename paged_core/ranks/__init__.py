"""Runs one model on several processes: starts and ends them, and sends them what rank 0 decides.

Each process is a rank. Rank 0 is the caller's own process: it has the engine, decides and samples. The others hold
their shard of the model and of its K/V, and carry out rank 0's orders.
"""
