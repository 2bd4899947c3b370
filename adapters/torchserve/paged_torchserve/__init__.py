"""A TorchServe handler over an AsyncEngine, and the commands that put it into archives and serve them."""
