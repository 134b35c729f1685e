"""What is computed number by number between the GEMMs and attention: local functions of standard ops
with native CPU kernels.
"""

__all__ = ["DOMAIN"]

DOMAIN = "anybit_pointwise"  # further forms in one model have domains below it
