"""Times on a GPU: a CUDA graph of many calls, each with weights that no cache holds any more."""

from __future__ import annotations

import datetime
import math
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

__all__ = [
    "Peers",
    "Time",
    "copies_for",
    "copy_bandwidth",
    "gpu_facts",
    "matmul_rate",
    "result_name",
    "time_calls",
]

_GRAPH_US, _MOST_CALLS, _MOST_REPLAYS = (
    1000.0,
    200,
    50,
)  # a graph of about so long, so that the gap between two replays is nothing


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median of the graph replays, and the distance between their
    quartiles; calls in the graph.
    """

    median: float
    spread: float
    calls: int


def time_calls(call: Callable[[int, int], object], budget: float, copies: int = 1) -> Time:
    """Time call(i, stream), i = 0, 1, ..., captured in a graph. Replays are enqueued one behind the
    other, the first of them untimed, so that the GPU never waits for the host.

    Args:
        budget: seconds for the replays, about; there are at least three.
        copies: calls after which the same weights come again; the graph holds at least as many, so
            that all of them are used.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call(0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    start.record()
    call(0, torch.cuda.current_stream().cuda_stream)
    end.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(end) * 1e3, 1.0)  # with the host's part: an upper limit
    calls = max(copies, min(_MOST_CALLS, math.ceil(_GRAPH_US / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for i in range(calls):
            call(i, stream)
    replays = min(_MOST_REPLAYS, max(3, int(budget * 1e6 / (once * calls))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    for i, event in enumerate(events):
        event.record()
        if i < replays:
            graph.replay()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) * 1e3 / calls for first, second in pairwise(events)]
    quartiles = statistics.quantiles(times, n=4)
    return Time(round(statistics.median(times), 3), round(quartiles[2] - quartiles[0], 3), calls)


def copies_for(bytes_of_one: int) -> int:
    """Copies of a tensor whose total is at least four times the second-level cache, at least two.

    A cache that throws out lines at random keeps 20 % of twice its size from one round to the next,
    but 2 % of four times.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(4 * cache / bytes_of_one))


def copy_bandwidth() -> float:
    """GB/s of a copy within device memory, read and written bytes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_calls(lambda i, stream: target.copy_(source), 0.2).median / 1e3


def gpu_facts() -> dict[str, Any]:
    """What a result file says of its day, its GPU and the versions that ran."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(copy_bandwidth(), 1),
    }


def result_name(benchmark: str, facts: dict[str, Any]) -> str:
    """Name of a result file without .json: benchmark, GPU and day."""
    device = re.sub(r"\W+", "-", facts["device"].lower())
    return f"{benchmark}-{device}-{facts['date']}"


def matmul_rate() -> float:
    """TFLOP/s of an fp16 product of 8192 x 8192 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    return float(2 * 8192**3 / time_calls(lambda i, stream: a @ b, 0.2).median / 1e6)


class Peers:
    """cuBLAS with the same x: fp16 (torch.matmul) and int8 (torch._int_mm, the product alone,
    without quantisation or scales).
    """

    def __init__(self, n: int, k: int) -> None:
        self.fp16 = [
            torch.randn(n, k, dtype=torch.float16, device="cuda")
            for _ in range(copies_for(2 * n * k))
        ]
        self.int8 = [
            torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
            for _ in range(copies_for(n * k))
        ]

    def times(self, x: torch.Tensor, budget: float) -> dict[str, Time]:
        """Of those that can run this number of tokens."""
        out = torch.empty(len(x), len(self.fp16[0]), dtype=torch.float16, device="cuda")
        copies = self.fp16
        found = {
            "fp16": time_calls(
                lambda i, stream: torch.mm(x, copies[i % len(copies)].t(), out=out),
                budget,
                len(copies),
            )
        }
        if len(x) > 16:  # _int_mm refuses fewer
            codes = torch.randint(-127, 128, x.shape, dtype=torch.int8, device="cuda")
            sums = torch.empty(out.shape, dtype=torch.int32, device="cuda")
            int8 = self.int8
            with suppress(
                RuntimeError
                # sizes that cuBLAS does not take: refused by the first call, before anything is
                # captured
            ):
                found["int8"] = time_calls(
                    lambda i, stream: torch._int_mm(codes, int8[i % len(int8)].t(), out=sums),
                    budget,
                    len(int8),
                )
        return found
