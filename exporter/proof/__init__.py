"""Compares what was made with its references, level by level."""
