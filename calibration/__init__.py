"""A float model becomes a quantized checkpoint: OUT/quant. Command: python -m calibration."""
