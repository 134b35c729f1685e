"""Writes the ONNX file."""
