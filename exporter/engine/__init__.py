"""Builds TensorRT engines."""
