"""What every op shares: its specification, packing, activations and ONNX body."""
