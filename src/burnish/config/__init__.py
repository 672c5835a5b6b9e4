"""Recipes: schema, loading, checks, provenance."""
