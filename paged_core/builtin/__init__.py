"""The core's own plugins, registered exactly as those of other projects are."""
