"""The torch references: the float model, and the quantised one with the kernels' arithmetic."""
