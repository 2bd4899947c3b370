"""The scheduler, the block pool and the router in simulated time, with a cost model in place of the model."""
