"""Policies: a model with its tokenizer and adapters."""
