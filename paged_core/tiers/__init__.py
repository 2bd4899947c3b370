"""K/V that outlive the cache: blocks that it gives up, kept where there is more room, and brought back."""
