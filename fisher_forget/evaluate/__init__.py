"""How close a scrubbed model came to models that were retrained without the forgotten data."""
