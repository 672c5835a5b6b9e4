"""Accuracy with intervals, and paired comparisons."""
