"""Rewards: what a completion is worth, or that it cannot be said."""
