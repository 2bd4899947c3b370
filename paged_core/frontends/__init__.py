"""The owners of an engine: LLM steps it in the caller's thread, AsyncEngine in a thread of its own."""
