"""Bundled tasks with exact verifiers."""
