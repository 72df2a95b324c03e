"""What attacks find in pairs of releases: see `__main__`."""
