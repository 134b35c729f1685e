"""Changes of a float model that keep its function: rotation and smoothing."""
