"""Rows to messages to token ids; ids are final."""
