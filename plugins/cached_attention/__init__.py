"""Attention with its KV cache: one node, a local function of standard ops and a native CPU kernel."""

__all__ = ["DOMAIN", "FLOAT_BITS", "LOW_BIT_OP", "OP", "is_attention"]

# Not below the domain of the GEMMs, whose nodes become plugins: every runtime takes the function.
DOMAIN = "anybit_attention"  # further forms in one model have domains below it
OP = "CachedAttention"
LOW_BIT_OP = "LowBitAttention"  # the cache holds codes
FLOAT_BITS = 16  # bits of a cache that holds numbers of the model's type


def is_attention(domain: str) -> bool:
    """Whether a node of this ONNX domain is attention with its cache."""
    return domain == DOMAIN or domain.startswith(f"{DOMAIN}.")
