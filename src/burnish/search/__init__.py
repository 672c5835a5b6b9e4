"""Test-time strategies."""
