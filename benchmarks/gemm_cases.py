"""What benchmarks/gemm.py measures: shapes, numbers of tokens, schemes, and the ratios to fp16 that
each scheme is to reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from plugins import op_spec
from plugins.core.op_spec import GemmAttributes

__all__ = ["QUICK_SHAPES", "QUICK_TOKENS", "SCHEMES", "SHAPES", "TARGET_SHAPE", "TOKENS", "Scheme"]

# N x K of y = x w^T: the four fused GEMMs of a layer (qkv, o, gate+up, down), then the shapes of
# the QQQ and ABQ-LLM papers.
SHAPES: dict[str, tuple[int, int]] = {
    "llama-7b qkv": (12288, 4096),
    "llama-7b o": (4096, 4096),
    "llama-7b gate+up": (22016, 4096),
    "llama-7b down": (4096, 11008),
    "llama-13b qkv": (15360, 5120),
    "llama-13b o": (5120, 5120),
    "llama-13b gate+up": (27648, 5120),
    "llama-13b down": (5120, 13824),
    "llama-70b qkv": (10240, 8192),
    "llama-70b o": (8192, 8192),
    "llama-70b gate+up": (57344, 8192),
    "llama-70b down": (8192, 28672),
    "llama-3-8b qkv": (6144, 4096),
    "llama-3-8b gate+up": (28672, 4096),
    "llama-3-8b down": (4096, 14336),
    "11008x4096": (11008, 4096),
    "8192x21760": (8192, 21760),
}
TARGET_SHAPE = "8192x21760"
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
QUICK_SHAPES, QUICK_TOKENS = ["llama-7b o", TARGET_SHAPE], [1, 16, 64, 1024]


@dataclass(frozen=True)
class Scheme:
    """One way to quantise, and the speed-up over fp16 it is to reach at TARGET_SHAPE.

    Attributes:
        name: as printed.
        op: of the plugins registry.
        wbits, levels, abits, act_symmetric, group_size: of GemmAttributes.
        targets: smallest ratio to fp16 with up to 16 tokens, with 64, and from 1024 on; empty where
            none is set.
    """

    name: str
    op: str
    wbits: int
    levels: int
    abits: int
    act_symmetric: int = 0
    group_size: int = 0
    targets: tuple[float, ...] = ()

    def attributes(self, n: int, k: int) -> GemmAttributes:
        """Of a layer [n, k]."""
        return GemmAttributes(
            self.wbits, self.levels, self.abits, self.act_symmetric, self.group_size, k, n, 0
        )

    def target(self, tokens: int) -> float | None:
        """The ratio to reach with this many tokens; None where none is set."""
        if not self.targets or not (tokens <= 16 or tokens == 64 or tokens >= 1024):
            return None
        return self.targets[0 if tokens <= 16 else 1 if tokens == 64 else 2]

    def weight_bits(self, k: int) -> float:
        """Bits per weight that a kernel reads, scales and zero points included."""
        row = op_spec(self.op).arrays(self.attributes(1, k))
        return sum(array.stored_bits for array in row) / k


SCHEMES = [
    Scheme("W4A8", "QQQGemm", 4, 16, 8, 1, 0, (3.7, 2.6, 1.8)),
    Scheme("W4A8 g128", "QQQGemm", 4, 16, 8, 1, 128, (3.5, 2.2, 1.6)),
    Scheme("W2A8", "ABQGemm", 2, 4, 8, targets=(6.5, 3.0, 1.5)),
    Scheme("W2*A8", "ABQGemm", 2, 5, 8, targets=(5.0, 2.6, 1.5)),
    Scheme("W8A8", "ABQGemm", 8, 256, 8, targets=(1.9, 1.8, 1.8)),
    Scheme("W2*A8 g64", "ABQGemm", 2, 5, 8, 0, 64),
    *(Scheme(f"W{bits}A8 abq", "ABQGemm", bits, 1 << bits, 8) for bits in (3, 4, 5, 6, 7)),
    Scheme("W4A4", "ABQGemm", 4, 16, 4),
    Scheme("W4A16", "ABQGemm", 4, 16, 16),
    Scheme("W2A16 g128", "ABQGemm", 2, 4, 16, 0, 128),
]
