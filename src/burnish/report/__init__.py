"""What a run says of itself, read from its folder."""
