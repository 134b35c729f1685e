"""Runs what the exporter made: text generation, perplexity, and the commands for NVIDIA's own
tools.
"""
