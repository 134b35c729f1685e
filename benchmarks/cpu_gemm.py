"""The CPU kernels of both ops in ONNX Runtime, beside this machine's plain read bandwidth.

python benchmarks/cpu_gemm.py [--seconds 2] [--threads 1 2] [--set avx512] [--order]

Every result is compared with reference() first. Then, on matrices of 4096 x 4096:
decode   one token through so many layers that their packed weights are over 64 MB, so that each comes
         from memory; a plain read of the same bytes by the same number of threads is timed in turn with
         it, and the ratio is the median of neighbours'
prefill  512 tokens through one layer, in 10^12 operations a second (a multiplication and an addition
         count as two): all, with a fused norm, and without the quantization of the tokens, for which
         the time of a layer of 32 output channels is taken away. With AMX also the ratios to a bare
         loop of tile products that is fed from the second cache by as many threads
Writes benchmarks/results/<processor>-<date>-gemm.json and prints a table. --set measures a lower
instruction set than the machine's.

With --order: one token through the shapes of Llama-3.2-1B, of 8, 6, 4, 3 and 2 bits one after the
other. A time per layer that does not fall with the bits ends in exit code 3. Writes
<processor>-<date>-gemm-order.json.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from result_file import write_result

from exporter.graph.nodes import NodeFactory
from plugins import op_spec
from plugins.core.op_spec import GemmAttributes, QuantArrays
from plugins.tools.build import build_onnxruntime
from plugins.tools.kernels import KernelLibrary, gemm_shape

HERE = Path(__file__).resolve().parent
N = K = 4096
COLD_BYTES = 96 << 20  # of all layers together; over 64 MB and any cache of the machines so far
PREFILL = 512
ORDER_SHAPES = ((512, 2048), (2048, 2048), (2048, 8192), (8192, 2048))  # [N, K]
ORDER_BITS = (8, 6, 4, 3, 2)
NARROW = 32  # output channels of a layer that hardly multiplies
ALIGNMENT = 4096  # of a tensor in its file
PAUSE = 0.005  # seconds in which spinning threads of the session before go to sleep
READER = """
#include <cstdint>
#include <cstddef>
#include <thread>
#include <vector>
static uint64_t sum(const uint64_t* p, size_t n) {
  uint64_t total = 0;
  for (size_t i = 0; i < n; ++i) total += p[i];
  return total;
}
extern "C" uint64_t read_all(const uint64_t* p, size_t words, int threads) {
  std::vector<uint64_t> totals(threads);
  const auto run = [&](int t) {
    const size_t first = words * t / threads, last = words * (t + 1) / threads;
    totals[t] = sum(p + first, last - first);
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(run, t);
  run(0);
  for (auto& thread : pool) thread.join();
  for (int t = 1; t < threads; ++t) totals[0] += totals[t];
  return totals[0];
}
"""

# Tile products of 2 x 2 tiles, from 256 KB of tokens and as much of weights.
BARE = """
#define ANYBIT_SET bare
#include <thread>
#include <vector>
#include "core/cpu/tiles.h"
using namespace anybit::cpu::bare;
constexpr int kBytes = 256 << 10;
struct alignas(64) Operands { char tokens[kBytes], weights[kBytes]; };
static void run(Operands* from, int rounds) {
  const TileScope scope(16);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int i = 0; i < rounds; ++i) {
    for (int at = 0; at < kBytes; at += 2048) {
      tile_load<4>(from->tokens + at, 64), tile_load<6>(from->weights + at, 64);
      tile_multiply_add<0, 4, 6>();
      tile_load<7>(from->weights + at + 1024, 64);
      tile_multiply_add<1, 4, 7>();
      tile_load<5>(from->tokens + at + 1024, 64);
      tile_multiply_add<2, 5, 6>();
      tile_multiply_add<3, 5, 7>();
    }
  }
}
extern "C" double bare(int threads, int rounds) {  // operations
  static std::vector<Operands> operands(64);
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(run, &operands[t], rounds);
  run(&operands[0], rounds);
  for (auto& thread : pool) thread.join();
  return 2.0 * 4 * 16 * 16 * 64 * (kBytes / 2048) * rounds * threads;
}
"""
BARE_ROUNDS = 400

Case = tuple[str, GemmAttributes]


def cases() -> list[Case]:
    """Both ops, per channel and in groups of 128, with A8."""
    found: list[Case] = []
    for group in (0, 128):
        for bits in (2, 3, 4, 6, 8):
            found.append(("ABQGemm", GemmAttributes(bits, 1 << bits, 8, 1, group, K, N, 0)))
        found.append(("QQQGemm", GemmAttributes(4, 16, 8, 1, group, K, N, 0)))
    found.append(("ABQGemm", GemmAttributes(4, 16, 8, 0, 0, K, N, 0)))  # asymmetric activations
    for group in (0, 128):  # activations that are not quantized
        for bits in (2, 3, 4, 8):
            found.append(("ABQGemm", GemmAttributes(bits, 1 << bits, 16, 1, group, K, N, 0)))
    return found


def title(case: Case) -> str:
    op, attrs = case
    kind = "" if attrs.act_symmetric else " asymmetric"
    return f"{op} {attrs.title}{kind} {f'g{attrs.group_size}' if attrs.group_size else 'channel'}"


def weights(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Packed random weights."""
    op, attrs = case
    rng = np.random.default_rng(seed)
    n, k = attrs.out_features, attrs.in_features
    scale = rng.uniform(0.001, 0.01, (n, attrs.n_groups if op == "ABQGemm" else 1))
    if op == "ABQGemm":
        arrays = QuantArrays(
            rng.integers(0, attrs.levels, (n, k), np.uint8),
            scale.astype(np.float32),
            rng.integers(0, attrs.levels, (n, attrs.n_groups), np.int32),
        )
    else:
        groups = rng.uniform(2, 15, (n, attrs.n_groups)).astype(np.float16)
        arrays = QuantArrays(
            rng.integers(-8, 8, (n, k), np.int8),
            scale.astype(np.float32),
            scale_group=groups if attrs.group_size else None,
        )
    packed = op_spec(op).pack(arrays, attrs, "benchmark")
    if attrs.has_norm:
        packed["gamma"] = rng.uniform(0.5, 2, k).astype(np.float16)
    return packed


class Layers:
    """A session of `count` GEMM nodes side by side. Their weights are in a file that ONNX Runtime
    maps, and so do we.
    """

    def __init__(self, case: Case, count: int, threads: int, folder: Path) -> None:
        op, attrs = case
        packed, data = weights(case, 0), folder / "weights.bin"
        self.count, self.packed = count, packed
        factory = NodeFactory(TensorProto.FLOAT16)
        nodes, initializers, outputs = [], [], []
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(build_onnxruntime()))
        kinds = {"int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
        kinds["float16"] = TensorProto.FLOAT16
        at = 0
        data.unlink(missing_ok=True)  # what an earlier session maps stays
        file = data.open("wb")
        for i in range(count):
            names = {name: f"{i}.{name}" for name in packed}
            for name, array in packed.items():
                tensor = TensorProto(name=names[name], dims=array.shape)
                tensor.data_type = kinds[str(array.dtype)]
                tensor.data_location = TensorProto.EXTERNAL
                where = {"location": data.name, "offset": at, "length": array.nbytes}
                for key, value in where.items():
                    tensor.external_data.add(key=key, value=str(value))
                initializers.append(tensor)
                padding = -array.nbytes % ALIGNMENT
                file.write(array.tobytes() + bytes(padding))
                at += array.nbytes + padding
            inputs = ["X", *(names[name] for name in op_spec(op).input_names(attrs)[1:])]
            nodes.append(factory.gemm(op, attrs, f"gemm{i}", inputs, f"Y{i}"))
            shape = ["M", attrs.out_features]
            outputs.append(helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT16, shape))
        x = helper.make_tensor_value_info("X", TensorProto.FLOAT16, ["M", attrs.in_features])
        model = helper.make_model(
            helper.make_graph(nodes, "gemms", [x], outputs, initializers),
            ir_version=11,
            functions=factory.functions(),
            opset_imports=factory.opset_imports(23),
        )
        file.close()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.mapped = np.memmap(data, np.uint64, "r")

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        return list(self.session.run(None, {"X": x}))

    def check(self, case: Case, x: np.ndarray) -> None:
        """Compare every output with reference()."""
        op, attrs = case
        want = op_spec(op).reference(x, self.packed, attrs)
        for y in self.run(x):
            if attrs.abits < 16:
                np.testing.assert_array_equal(y, want)
            else:
                np.testing.assert_allclose(y, want, rtol=2e-3, atol=2e-2)


class Reader:
    """Reads an array from end to end with a plain compiled loop."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "read.cpp", folder / "read.so"
        source.write_text(READER, encoding="utf-8")
        flags = ["-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        self._read = ctypes.CDLL(str(library)).read_all

    def __call__(self, array: np.ndarray, threads: int) -> None:
        pointer = ctypes.c_void_p(array.ctypes.data)
        self._read(pointer, ctypes.c_size_t(array.size), threads)


def seconds_of(call: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def decode(case: Case, threads: int, seconds: float, read: Reader, folder: Path) -> dict[str, Any]:
    """One token against cold weights, in turn with a plain read of the same bytes."""
    size = sum(array.nbytes for array in weights(case, 0).values())
    layers = Layers(case, -(-COLD_BYTES // size), threads, folder)
    x = np.random.default_rng(1).normal(size=(1, case[1].in_features)).astype(np.float16)
    layers.check(case, x)
    mapped, total = layers.mapped, layers.mapped.nbytes
    kernel: list[float] = []
    plain: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(kernel) < 5:
        plain.append(seconds_of(lambda: read(mapped, threads)))
        kernel.append(seconds_of(lambda: layers.run(x)))
    ratios = [p / k for p, k in zip(plain, kernel, strict=True)]
    return {
        "megabytes": round(total / 1e6, 1),
        "gigabytes_per_second": round(total / statistics.median(kernel) / 1e9, 2),
        "plain_read_gigabytes_per_second": round(total / statistics.median(plain) / 1e9, 2),
        "of_plain_read": round(statistics.median(ratios), 3),
        "microseconds_per_layer": round(statistics.median(kernel) / layers.count * 1e6, 1),
        "runs": len(kernel),
    }


def order(
    shape: tuple[int, int], group: int, threads: int, seconds: float, read: Reader, folder: Path
) -> dict[str, Any]:
    """One token against cold weights of fewer and fewer bits, and whether each is faster."""
    n, k = shape
    found: dict[int, dict[str, Any]] = {}
    for bits in ORDER_BITS:
        attrs = GemmAttributes(bits, 1 << bits, 8, 1, group, k, n, 0)
        found[bits] = decode(("ABQGemm", attrs), threads, seconds, read, folder)
    times = [one["microseconds_per_layer"] for one in found.values()]
    return {
        "shape": shape,
        "group": group,
        "threads": threads,
        "falls": all(less < more for more, less in pairwise(times)),
        "bits": {str(bits): one for bits, one in found.items()},
    }


def order_line(row: dict[str, Any]) -> str:
    """Times in us and parts of a plain read."""
    kind = f"g{row['group']}" if row["group"] else "channel"
    widths = (
        f"W{bits} {one['microseconds_per_layer']:7.1f} ({one['of_plain_read']:4.0%})"
        for bits, one in row["bits"].items()
    )
    name = f"{row['shape'][0]} x {row['shape'][1]} {kind}"
    verdict = "" if row["falls"] else "  DOES NOT FALL"
    return f"{name:20} {row['threads']} threads  {'  '.join(widths)}{verdict}"


class BareTiles:
    """A loop of tile products and nothing else; None is what it gives on a machine without AMX."""

    def __init__(self, folder: Path) -> None:
        shape = gemm_shape(cases()[0][1], PREFILL, np.dtype(np.float16))
        library = KernelLibrary(build_onnxruntime())  # it has asked Linux for leave
        self._bare: Any = None
        if "amx" not in library.tactics("ABQGemm", shape).values():
            return
        source, made = folder / "bare.cpp", folder / "bare.so"
        source.write_text(BARE, encoding="utf-8")
        flags = [
            "-std=c++17",
            "-O3",
            "-shared",
            "-fPIC",
            "-pthread",
            f"-I{HERE.parent / 'plugins'}",
        ]
        subprocess.run(["g++", *flags, str(source), "-o", str(made)], check=True)
        self._bare = ctypes.CDLL(str(made)).bare
        self._bare.restype = ctypes.c_double

    def __call__(self, threads: int) -> float | None:
        """Operations a second."""
        if self._bare is None:
            return None
        operations: list[float] = []
        seconds = seconds_of(lambda: operations.append(self._bare(threads, BARE_ROUNDS)))
        return operations[0] / seconds


def prefill(
    case: Case, threads: int, seconds: float, bare: BareTiles, folder: Path
) -> dict[str, Any]:
    """Many tokens through one layer, through the same with a norm, and through a narrow one."""
    op, attrs = case
    forms = {
        "all": attrs,
        "with_norm": replace(attrs, norm_epsilon=1e-5),
        "narrow": replace(attrs, out_features=NARROW),
    }
    x = np.random.default_rng(1).normal(size=(PREFILL, K)).astype(np.float16)
    times: dict[str, list[float]] = {name: [] for name in forms}
    bare_times: list[float] = []
    # One session at a time: the threads of others would wait on the cores.
    for name, form in forms.items():
        (folder / name).mkdir(exist_ok=True)
        layer = Layers((op, form), 1, threads, folder / name)
        layer.check((op, form), x[:33])
        end = time.monotonic() + seconds / len(forms)
        while time.monotonic() < end or len(times[name]) < 5:
            times[name].append(seconds_of(lambda layer=layer: layer.run(x)))  # type: ignore[misc]
            if (speed := bare(threads)) is not None:
                bare_times.append(speed)
        del layer
    median = {name: statistics.median(found) for name, found in times.items()}
    operations = 2 * PREFILL * N * K
    alone = 2 * PREFILL * (N - NARROW) * K / (median["all"] - median["narrow"])
    speeds = {
        "tera_operations_per_second": operations / median["all"],
        "with_norm": operations / median["with_norm"],
        "without_quantization": alone,
        "fastest": operations / min(times["all"]),
    }
    result: dict[str, Any] = {name: round(speed / 1e12, 3) for name, speed in speeds.items()}
    if bare_times:
        floor = statistics.median(bare_times)
        result["bare_tiles"] = round(floor / 1e12, 3)
        result["of_bare_tiles"] = round(alone / floor, 3)
        result["of_bare_tiles_with_norm"] = round(speeds["with_norm"] / floor, 3)
    return result | {"runs": len(times["all"])}


def main() -> None:
    """Measure all cases, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--set", default="", help="an instruction set, as ANYBIT_CPU names it")
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--order", action="store_true", help="time by bits on shapes of a 1B model")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    os.environ["ANYBIT_CPU"] = args.set
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read, bare = Reader(folder), BareTiles(folder)
        for shape, group, threads in product(ORDER_SHAPES, (0, 128), args.threads):
            if not args.order or args.only not in "x".join(map(str, shape)):
                continue
            rows.append(order(shape, group, threads, args.seconds, read, folder))
            print(order_line(rows[-1]), flush=True)
        for case in [] if args.order else cases():
            if args.only not in title(case):
                continue
            for threads in args.threads:
                row = {"case": title(case), "threads": threads}
                row["decode"] = decode(case, threads, args.seconds, read, folder)
                line = "{gigabytes_per_second:6.2f} GB/s = {of_plain_read:.0%} of a plain read"
                text = line.format(**row["decode"])
                if not args.no_prefill:
                    row["prefill"] = prefill(case, threads, args.seconds, bare, folder)
                    text += "  {tera_operations_per_second:.3f} TOPS".format(**row["prefill"])
                    if "of_bare_tiles" in row["prefill"]:
                        text += "  {of_bare_tiles:.0%} of bare tiles".format(**row["prefill"])
                        text += ", {of_bare_tiles_with_norm:.0%} with norm".format(**row["prefill"])
                rows.append(row)
                print(f"{row['case']:34} {threads} threads {text}", flush=True)
    record = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "cores": os.cpu_count(),
        "instruction_set": args.set or "the best",
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "rows": rows,
    }
    if not args.order:
        record["matrix"] = [N, K]
    if not args.no_record:
        name = "gemm-order" if args.order else "gemm"
        write_result(f"{name}-{args.set}" if args.set else name, record)
    if not all(row.get("falls", True) for row in rows):
        sys.exit(3)


if __name__ == "__main__":
    main()
