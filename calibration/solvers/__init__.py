"""Numerical building blocks that the quantisation methods share: grids, GPTQ, rotation, smoothing."""
