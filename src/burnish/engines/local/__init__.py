"""The engine on this machine's own model."""
