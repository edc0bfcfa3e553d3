"""The stages, a file each: settings, needs and work."""
