"""Bits of every node within a budget, by measured sensitivity."""
