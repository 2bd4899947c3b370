"""The patched generate(): the callable, its tiers, and the engine behind them."""
