"""The core's own plugins, registered exactly as a stranger's would be."""
