"""Speed of the low-bit GEMM kernels against cuBLAS, on the GPU of this machine; every result is
checked before it is timed.

python -m benchmarks.gemm [--quick] [--shapes NAME ...] [--tokens M ...] [--schemes NAME ...]
[--tactics [--table FILE]] [--seconds 420] python -m benchmarks.gemm --check-only [--sim]

Needs PyTorch, numpy, ml_dtypes and nvcc; neither TensorRT nor a network. Kernel time with the
quantisation of the activations included, weights cold in the second-level cache, launches in a CUDA
graph, median of its replays. Peers in the same run: cuBLAS in fp16 and int8, and each kernel's own
simple form. --tactics times every kernel that can run a shape, not only the one that is chosen;
with --table FILE the fastest become rows for plugins/core/host/measured.inc, which the library
consults before its own rules. --check-only compares with numpy and times nothing; with --sim on the
CPU, at small shapes. Prints a table of the targets last; writes
benchmarks/results/gemm-<device>-<date>.json (-2, -3 ... for later runs of a day) after each layer
and a plot beside it. A failure is noted and the rest goes on. Exit code 3: a wrong result, or a
target of this run that was missed or not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gemm_cases import QUICK_SHAPES, QUICK_TOKENS, SCHEMES, SHAPES, TARGET_SHAPE, TOKENS
from benchmarks.gemm_kernels import Kernels, Layer, check
from benchmarks.gemm_plot import plot
from benchmarks.gemm_tables import measured_rows, merged_table, target_table
from plugins.cli import run_cli, whole_number
from plugins.errors import EXIT_CHECK, CheckError, InputError
from plugins.tools.kernels import SIMPLE

__all__ = ["Run", "main", "new_path", "other_shares"]

HERE = Path(__file__).resolve().parent
_SIM_SHAPES, _SIM_TOKENS = {"sim": (130, 256), "sim wide": (64, 640)}, [1, 3, 17]
_MOST_SIMPLE_WORK = 1 << 33  # multiplications of the simple kernels, which are slow

_Result = TypeVar("_Result")


class _DeviceLostError(Exception):
    """The GPU refuses every further call, as after an illegal access."""


class Run:
    """One run: its kernels, the time that is left, and the result file, brought up to date after
    each layer.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        kernels: Kernels,
        shapes: dict[str, tuple[int, int]],
        tokens: list[int],
    ) -> None:
        self.args, self.kernels, self.tokens = args, kernels, tokens
        self.shapes = {
            name: shapes[name] for name in sorted(shapes, key=lambda name: name != TARGET_SHAPE)
        }  # the target first
        self.schemes = [
            scheme for scheme in SCHEMES if not args.schemes or scheme.name in args.schemes
        ]
        self.cases = self.left = (
            len(shapes) * len(tokens) * (len(self.schemes) + 2)
        )  # left: still to be timed; a peer counts as one
        self.complete = 0  # cases of which every wanted kernel was timed
        self.deadline = time.monotonic() + args.seconds
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.result: dict[str, Any] = {}

    def start(self) -> None:
        """Measure the device's own limits first."""
        from benchmarks.gemm_timing import gpu_facts, matmul_rate, result_name

        gc.freeze()  # older versions of torch collect garbage before each of thousands of graphs
        self.deadline = time.monotonic() + self.args.seconds
        facts = gpu_facts()
        self.result = {
            **facts,
            "command": sys.argv[1:],
            "fp16_tflops": round(matmul_rate(), 1),
            "not_timed": self.cases,
            "failures": self.failures,
            "rows": self.rows,
        }
        self.path = new_path(self.args.results, result_name("gemm", facts))
        copies, matmul = facts["copy_gb_per_s"], self.result["fp16_tflops"]
        print(
            f"{facts['device']}: copies at {copies} GB/s, fp16 matmul at {matmul} TFLOP/s",
            flush=True,
        )

    def check(self) -> int:
        """Compare every tactic with numpy, until the GPU is lost; returns how many were."""
        compared = 0
        with suppress(_DeviceLostError):
            for name, (n, k) in self.shapes.items():
                for scheme in self.schemes:
                    layer = Layer(self.kernels, scheme, n, k, 1)
                    for m in self.tokens:
                        x = layer.tokens(m)
                        for tactic in self.kernels.tactics(scheme.op, layer.attrs, m):
                            if tactic != SIMPLE or m * n * k <= _MOST_SIMPLE_WORK:
                                compared += 1
                                self._guarded(partial(check, layer, x, tactic))
                print(f"{name}: compared", flush=True)
        return compared

    def measure(self) -> None:
        """Time everything, shape by shape; what a failure or the end of the time leaves out is
        counted, and the rest is kept.
        """
        try:
            with suppress(_DeviceLostError):
                for name, (n, k) in self.shapes.items():
                    began = time.monotonic()
                    self._measure_shape(name, n, k)
                    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        finally:
            self.save()

    def save(self) -> None:
        """Write what there is; cases that are not complete count as not timed."""
        self.result["not_timed"] = self.cases - self.complete
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")

    def _guarded(self, work: Callable[[], _Result]) -> _Result | None:
        """The work's result; None after a failure, which is noted. A GPU that has failed ends the
        run.
        """
        try:
            return work()
        except (CheckError, RuntimeError) as error:
            self.failures.append(str(error))
            print(f"FAILED {error}", flush=True)
        if self.kernels.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"stopped: {error}", flush=True)
                raise _DeviceLostError from None
        return None

    def _share(self, cases: int = 1) -> float:
        """Seconds for one of the cases that are left, half of them for the timed part; 0 when the
        time is over.
        """
        left = self.deadline - time.monotonic()
        share = max(left, 0) / self.left / 2
        self.left = max(self.left - cases, 1)
        return share

    def _measure_shape(self, name: str, n: int, k: int) -> None:
        from benchmarks.gemm_timing import Peers, copies_for

        if time.monotonic() > self.deadline:
            return
        peers, fp16 = Peers(n, k), {}
        for m in self.tokens:
            if not (share := self._share(2)):
                continue
            x = torch.randn(m, k, dtype=torch.float16, device=self.kernels.device)
            times = self._guarded(partial(peers.times, x, share))
            self.complete += 2 if times else 0
            for peer, took in (times or {}).items():
                self.rows.append(
                    {
                        "shape": name,
                        "n": n,
                        "k": k,
                        "m": m,
                        "scheme": peer,
                        "kernel": "cuBLAS",
                        **asdict(took),
                    }
                )
                if peer == "fp16":
                    fp16[m] = took.median
        del peers
        torch.cuda.empty_cache()
        for scheme in self.schemes:
            layer = Layer(
                self.kernels, scheme, n, k, copies_for(int(n * k * scheme.weight_bits(k) / 8))
            )
            for m in self.tokens:
                if (share := self._share()) and m in fp16:
                    self._measure_layer(name, layer, m, (fp16[m], share))
            del layer
            torch.cuda.empty_cache()
            self.save()

    def _measure_layer(
        self, name: str, layer: Layer, m: int, fp16_and_share: tuple[float, float]
    ) -> None:
        scheme, n, k = layer.scheme, layer.attrs.out_features, layer.attrs.in_features
        fp16, share = fp16_and_share
        x, tactics = layer.tokens(m), self.kernels.tactics(scheme.op, layer.attrs, m)
        chosen = next(iter(tactics))
        wanted = [
            tactic
            for tactic in tactics
            if tactic == chosen or (self.args.tactics and tactic != SIMPLE)
        ]
        if (
            name == TARGET_SHAPE
            and m in (1, 16)
            and chosen != SIMPLE
            and m * n * k <= _MOST_SIMPLE_WORK
        ):
            wanted.append(SIMPLE)
        found: list[dict[str, Any] | None] = []

        def one(tactic: int, more: dict[str, Any]) -> None:
            row = self._measure_tactic((name, layer, x, tactic), share / len(wanted))
            found.append(row)
            if row:
                row |= {**more, "speedup": round(fp16 / row["median"], 3)}

        for tactic in wanted:
            one(tactic, {"kernel": tactics.get(tactic, "simple"), "chosen": tactic == chosen})
        if self.args.tactics:
            ranked = sorted(
                (row for row in found if row and row["tactic"] != SIMPLE),
                key=lambda row: row["median"],
            )
            for best in ranked[:2]:
                for tactic in other_shares(best["tactic"]):
                    one(tactic, {"kernel": best["kernel"], "chosen": False, "other_shares": True})
        complete = all(found)
        self.complete += complete
        for row in filter(None, found):
            row["complete"] = complete

    def _measure_tactic(
        self, what: tuple[str, Layer, torch.Tensor, int], share: float
    ) -> dict[str, Any] | None:
        """Check one kernel, time it, and see that the last call of the graph gave the bits of a
        call on its own.

        Returns:
            The row, which is among self.rows; None after a failure, or if the time was over.
        """
        from benchmarks.gemm_timing import time_calls

        name, layer, x, tactic = what
        if time.monotonic() > self.deadline:
            return None

        def work() -> Any:
            check(layer, x, tactic)
            y, run = layer.prepare(x, tactic)
            took = time_calls(run, share, 1 if tactic == SIMPLE else len(layer.copies))
            timed = y.clone()
            y.fill_(float("nan"))
            run(took.calls - 1, 0)
            if y.is_cuda:
                torch.cuda.synchronize()
            if not torch.equal(timed, y):
                raise CheckError(
                    f"{layer.scheme.name} {len(x)} tokens, {name}, tactic {tactic}",
                    f"got {int((timed != y).sum())} outputs that differ between graph and "
                    f"single call, expected none",
                    "Run the self-test",
                )
            return took

        if not (took := self._guarded(work)):
            return None
        m, n, k = len(x), layer.attrs.out_features, layer.attrs.in_features
        moved = n * k * layer.scheme.weight_bits(k) / 8 + 2 * m * (n + k)
        self.rows.append(
            {
                "shape": name,
                "n": n,
                "k": k,
                "m": m,
                "scheme": layer.scheme.name,
                "tactic": tactic,
                **asdict(took),
                "gb_per_s": round(moved / took.median / 1e3, 1),
                "tops": round(2 * m * n * k / took.median / 1e6, 1),
            }
        )
        return self.rows[-1]


def new_path(folder: Path, name: str) -> Path:
    """folder/name.json, or name-2.json and so on: a later run of the same day must not take an
    earlier one's place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return next(
        path
        for i in count(1)
        if not (path := folder / f"{name}{f'-{i}' if i > 1 else ''}.json").exists()
    )


def other_shares(tactic: int) -> list[int]:
    """The tactic's kernel with half and with twice its shares of K (the library takes what is too
    many as the most it can).
    """
    kernel, shares = divmod(tactic, 64)
    return [
        64 * kernel + other
        for other in sorted({max(1, shares // 2), min(63, 2 * shares)} - {shares})
    ]


def _library(args: argparse.Namespace) -> str:
    from plugins.tools.build import build_library, build_sim

    if args.sim:
        return str(build_sim())
    if not torch.cuda.is_available():
        raise InputError(
            "benchmarks.gemm",
            "got no CUDA device, expected one",
            "Run it on a GPU; without one: --check-only --sim",
        )
    return str(
        build_library()
    )  # the library of the self-test, with machine code for sm_90a: built once for both


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"two shapes, M = {', '.join(map(str, QUICK_TOKENS))}")
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="NAME", help=", ".join(SHAPES))
    add("--tokens", nargs="+", type=whole_number(1), metavar="M")
    add(
        "--schemes",
        nargs="+",
        choices=[scheme.name for scheme in SCHEMES],
        metavar="NAME",
        help=", ".join(s.name for s in SCHEMES),
    )
    add("--tactics", action="store_true", help="time every kernel, not only the chosen one")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="with --tactics: put the fastest kernels into this plugins/core/host/measured.inc",
    )
    add(
        "--seconds",
        type=whole_number(1),
        default=420,
        help="for everything but compiling (default 420; --quick 90)",
    )
    add("--check-only", action="store_true")
    add(
        "--sim", action="store_true", help="with --check-only: the kernels on the CPU, small shapes"
    )
    add("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    if args.sim and not args.check_only:
        raise InputError(
            "--sim",
            "got it without --check-only, expected both: the simulation has no speed",
            "Add --check-only",
        )
    if args.table and not args.tactics:
        raise InputError(
            "--table",
            "got it without --tactics, expected both: one kernel of each shape says nothing",
            "Add --tactics",
        )
    if args.quick:
        args.seconds = min(args.seconds, 90)
    names = args.shapes or (QUICK_SHAPES if args.quick else list(SHAPES))
    shapes = _SIM_SHAPES if args.sim else {name: SHAPES[name] for name in names}
    tokens = args.tokens or (_SIM_TOKENS if args.sim else QUICK_TOKENS if args.quick else TOKENS)
    run = Run(args, Kernels(_library(args), "cpu" if args.sim else "cuda"), shapes, tokens)
    if args.check_only:
        compared = run.check()
        print(
            f"{compared} results compared, "
            + (f"{len(run.failures)} WRONG" if run.failures else "all right")
        )
        return EXIT_CHECK if run.failures else 0
    run.start()
    run.measure()
    text, missed = target_table(
        run.rows, run.schemes, run.tokens if TARGET_SHAPE in run.shapes else ()
    )
    plot(run.result, run.path.with_suffix(".svg"))
    if args.table:
        old = args.table.read_text(encoding="utf-8") if args.table.exists() else ""
        args.table.write_text(
            merged_table(old, measured_rows(run.result, run.schemes)), encoding="utf-8"
        )
    left_out = run.result["not_timed"]
    omitted = (
        f", {left_out} cases not timed in full: see what failed, or give more --seconds"
        if left_out
        else ""
    )
    print(f"\nwritten to {run.path} and {run.path.with_suffix('.svg').name}{omitted}")
    print("\n".join([f"FAILED {failure}" for failure in run.failures] + [text]))
    return EXIT_CHECK if missed or run.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_cli(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
