"""Killable child processes."""
