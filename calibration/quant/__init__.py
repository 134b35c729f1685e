"""Quantised models: schemes, bits, sizes, the quant folder."""
