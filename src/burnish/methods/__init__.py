"""Where batches come from and which objective they get."""
