"""Runs a decoder: one file per runtime."""
