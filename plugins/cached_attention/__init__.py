"""Attention with its KV cache: one node, a local function of standard ops and a native CPU kernel."""

__all__ = ["DOMAIN", "OP", "is_attention"]

# Not below the domain of the GEMMs, whose nodes become plugins: every runtime takes the function.
DOMAIN = "anybit_attention"  # further forms in one model have domains below it
OP = "CachedAttention"


def is_attention(domain: str) -> bool:
    """Whether a node of this ONNX domain is attention with its cache."""
    return domain == DOMAIN or domain.startswith(f"{DOMAIN}.")
