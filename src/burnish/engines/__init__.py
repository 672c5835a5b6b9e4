"""Engines grow forests: prefill once, fork, sample, score."""
