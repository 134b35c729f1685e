"""A quantized checkpoint becomes ONNX, an engine, a proof and a report: python -m exporter."""
