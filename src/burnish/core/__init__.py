"""Nouns and contracts shared by every layer. Imports neither torch nor transformers."""
