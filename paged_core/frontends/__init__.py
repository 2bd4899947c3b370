"""Who turns the engine: LLM in the caller's thread, AsyncEngine in its own."""
