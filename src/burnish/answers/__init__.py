"""Extract, normalise and compare answers."""
