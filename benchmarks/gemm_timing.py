"""Times on a GPU: a CUDA graph of many calls, each with weights that no cache holds any more."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Peers", "Time", "copy_bandwidth", "matmul_rate", "time_calls"]

_CALLS = 20  # in a graph


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median of the graph replays, and the distance between their quartiles."""

    median: float
    spread: float


def time_calls(call: Callable[[int, int], object], budget: float, calls: int = _CALLS) -> Time:
    """Time call(i, stream), i = 0, 1, ...; launches are captured in a graph, so their cost on the host does not count.

    Args:
        budget: seconds for the timed replays.
    """
    call(0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for i in range(calls):
            call(i, stream)

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / calls

    replay()
    once = replay()
    repeats = min(50, max(5, int(budget * 1e6 / max(once * calls, 1))))
    times = [replay() for _ in range(repeats)]
    quartiles = statistics.quantiles(times, n=4)
    return Time(round(statistics.median(times), 3), round(quartiles[2] - quartiles[0], 3))


def copies_for(bytes_of_one: int) -> int:
    """Copies of a tensor whose total is more than twice the second-level cache, at least two."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-2 * cache // bytes_of_one) + 1)


def copy_bandwidth() -> float:
    """GB/s of a copy within device memory, read and written bytes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_calls(lambda i, stream: target.copy_(source), 0.2, 4).median / 1e3


def matmul_rate() -> float:
    """TFLOP/s of an fp16 product of 8192 x 8192 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    return float(2 * 8192**3 / time_calls(lambda i, stream: a @ b, 0.2, 4).median / 1e6)


class Peers:
    """cuBLAS with the same x: fp16 (torch.matmul) and int8 (torch._int_mm, the product alone, without quantisation or scales)."""

    def __init__(self, n: int, k: int) -> None:
        self.fp16 = [torch.randn(n, k, dtype=torch.float16, device="cuda") for _ in range(copies_for(2 * n * k))]
        self.int8 = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(copies_for(n * k))]

    def times(self, x: torch.Tensor, budget: float) -> dict[str, Time]:
        """Of those that can run this number of tokens."""
        out = torch.empty(len(x), len(self.fp16[0]), dtype=torch.float16, device="cuda")
        found = {"fp16": time_calls(lambda i, stream: torch.mm(x, self.fp16[i % len(self.fp16)].t(), out=out), budget)}
        if len(x) > 16:  # _int_mm refuses fewer
            codes = torch.randint(-127, 128, x.shape, dtype=torch.int8, device="cuda")
            found["int8"] = time_calls(lambda i, stream: torch._int_mm(codes, self.int8[i % len(self.int8)].t()), budget)
        return found
