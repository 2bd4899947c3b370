"""The scheduler, the block pool and the router at work in simulated time: a cost model stands where the model would."""
