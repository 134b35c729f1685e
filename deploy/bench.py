"""python -m deploy bench: how long a prefill and a decode step take, and what that is of the memory's
speed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.out.layout import DATA_FILE, ENGINE_FILE, MODEL_FILE, ONNX
from deploy.command import Command, add_runner, check_file
from exporter.run.model import AUTO
from plugins.cli import whole_number
from plugins.cores import usable_cores
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from exporter.run.model import Model
    from exporter.run.sessions import DecoderSession

__all__ = ["COMMAND", "BenchRequest", "Timed", "bench", "plot", "table"]

_READ = 1 << 28  # bytes whose reading measures the memory's speed, more than caches hold
_READS = 5
# Operators' inputs
_BY_ROWS = {
    ("Gather", 0),
    *((op, place) for op in ("RotatedHeads", "RotaryEmbedding") for place in (1, 2)),
}
_WIDTH, _LEFT, _ROW = 720, 40, 46  # of the picture, in pixels
_MANY = 20  # times from which on percentiles say more than the maximum does


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What is timed.

    Attributes:
        outs: artifacts, which take turns in every round.
        runner: "auto" or a name of exporter/run.
        prompt: tokens of the prefill.
        new: decode steps behind it.
        batch: sequences at once, all with the same text.
        rounds: that are counted, behind one that is not.
    """

    outs: Sequence[Path]
    runner: str = AUTO
    prompt: int = 128
    new: int = 32
    batch: int = 1
    rounds: int = 5


@dataclass
class Timed:
    """What one artifact took.

    Attributes:
        out, runner: which, and who ran it.
        bytes: of its weights' file.
        step: bytes that a decode step has to read on average, weights and KV cache; None where
            the runner does not read them from the ONNX file into the CPU.
        prefill, decode: seconds of each call, in order.
        tokens: of a prefill, and of a decode step, all sequences together.
    """

    out: str
    runner: str
    bytes: int
    step: float | None
    tokens: Mapping[str, int]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def bench(
    request: BenchRequest,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda text: None,
) -> list[Timed]:
    """Time each artifact; they take turns, so that whatever else the machine does meets all.

    Args:
        request: what is timed.
        clock: seconds.
        say: told of each round before it begins; nothing else runs beside what is timed, no bar
            either.

    Raises:
        InputError: an artifact cannot be run here, or its context is too short. CheckError: a model
            computes NaN.
    """
    from exporter.run.model import find_model

    models = [find_model(out, request.runner) for out in request.outs]
    with ExitStack() as stack:
        work = []
        for out, model in zip(request.outs, models, strict=True):
            session = stack.enter_context(model.open())
            _check_length(session, out, request)
            vocab = model.description.sizes["vocab_size"]
            tokens = {"prefill": request.batch * request.prompt, "decode": request.batch}
            size = _weights(model.folder.path)
            step = _step_bytes(model, request) if model.runner.stage == ONNX else None
            timed = Timed(str(out), model.runner.name, size, step, tokens)
            work.append((session, _prompt(model.tokenizer(), vocab, request), timed))
        for count in range(request.rounds + 1):
            say(f"round {count} of {request.rounds}" if count else "a round that does not count")
            for session, ids, timed in work:
                prefill, decode = _round(session, ids, request.new, clock)
                if count:  # the first is for caches, threads and pages
                    timed.prefill.append(prefill)
                    timed.decode += decode
    return [timed for *_, timed in work]


def _check_length(session: DecoderSession, out: Path, request: BenchRequest) -> None:
    if (wanted := request.prompt + request.new) > session.max_context:
        raise InputError(
            "--prompt-len and --gen-len",
            f"got {wanted} tokens together, expected at most {session.max_context}, the context of "
            f"{out}",
            "Give less, or export with a larger --max-seq",
        )


def _weights(folder: Path) -> int:
    paths = [folder / name for name in (DATA_FILE, ENGINE_FILE) if (folder / name).is_file()]
    paths = paths or sorted(folder.glob("*.safetensors"))
    return sum(path.stat().st_size for path in paths)


def _step_bytes(model: Model, request: BenchRequest) -> float:
    """What a decode step reads: each initializer once, of tables that are looked up alone a row for
    each sequence, and the keys and values of all tokens before it.
    """
    import onnx

    graph = onnx.load(model.folder.file(MODEL_FILE), load_external_data=False).graph
    reads: dict[str, set[bool]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            reads.setdefault(name, set()).add((node.op_type, place) in _BY_ROWS)
    weights = 0
    for tensor in graph.initializer:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        dims = list(tensor.dims)
        if dims and reads.get(tensor.name) == {True}:
            dims[0] = min(dims[0], request.batch)
        weights += math.prod(dims) * size
    cached = request.prompt + (request.new - 1) / 2  # tokens, on average
    return weights + request.batch * cached * model.description.cache.token_bytes


def _prompt(tokenizer: object, vocab: int, request: BenchRequest) -> np.ndarray:
    import numpy as np

    from calibration.data import default_text, text_tokens

    tokens = text_tokens(tokenizer, default_text(), vocab, "the default text")
    return np.tile(np.resize(tokens, request.prompt), (request.batch, 1))


def _round(
    session: DecoderSession, ids: np.ndarray, new: int, clock: Callable[[], float]
) -> tuple[float, list[float]]:
    """Seconds of a prefill, and of each decode step behind it."""
    began = clock()
    logits = session.run(ids, reset=True, last_only=True)
    prefill, steps = clock() - began, []
    for _ in range(new):
        ids = logits[:, -1:].argmax(-1)
        began = clock()
        logits = session.run(ids, last_only=True)
        steps.append(clock() - began)
    return prefill, steps


def bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a thread for each usable core read here together, the best of a few."""
    import numpy as np

    threads = usable_cores()
    parts = np.array_split(np.ones(_READ // 8, np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READS):
            began = clock()
            list(pool.map(np.add.reduce, parts))
            best = min(best, clock() - began)
    return _READ / best


def summary(timed: Timed, speed: float) -> dict[str, dict[str, float]]:
    """{phase: {"min", "median", "p90", "p99" in ms, "tokens_per_second"}}, the percentiles only of 20
    times or more; of decode also the share of the memory's speed that reading what a step needs
    is, where that is known.
    """
    import numpy as np

    found = {}
    for phase, seconds in (("prefill", timed.prefill), ("decode", timed.decode)):
        if not seconds:
            continue
        places = {"min": 0, "median": 50} | (
            {"p90": 90, "p99": 99} if len(seconds) >= _MANY else {}
        )
        found[phase] = {
            name: 1e3 * float(np.percentile(seconds, place)) for name, place in places.items()
        }
        median = found[phase]["median"] / 1e3
        found[phase]["tokens_per_second"] = timed.tokens[phase] / median
        if phase == "decode" and timed.step is not None:
            found[phase]["of_bandwidth"] = timed.step / median / speed
    return found


def table(results: Sequence[Timed], speed: float) -> str:
    """Lines for people."""
    lines = [f"{'ms':<10}{'min':>10}{'median':>10}{'p90':>10}{'p99':>10}{'tokens/s':>12}"]
    for timed in results:
        reads = "" if timed.step is None else f", {timed.step / 1e6:.1f} MB read by a decode step"
        lines.append(f"{timed.out}, {timed.runner}, {timed.bytes / 1e6:.1f} MB of weights{reads}")
        for phase, found in summary(timed, speed).items():
            cells = "".join(
                f"{found[name]:>10.2f}" if name in found else f"{'-':>10}"
                for name in ("min", "median", "p90", "p99")
            )
            end = (
                f"  {found['of_bandwidth']:.0%} of {speed / 1e9:.1f} GB/s"
                if "of_bandwidth" in found
                else ""
            )
            lines.append(f"  {phase:<8}{cells}{found['tokens_per_second']:>12.1f}{end}")
    return "\n".join(lines)


def plot(results: Sequence[Timed]) -> str:
    """An SVG with a row for each artifact and phase: a dot for every time, on one logarithmic axis, and a
    line at the median.
    """
    import numpy as np

    from exporter.report.chart import escape

    names = {timed.out: Path(timed.out).name for timed in results}
    if len({*names.values()}) < len(names):
        names = {out: out for out in names}
    rows = [
        (f"{names[timed.out]}, {phase}", [1e3 * one for one in seconds])
        for phase in ("prefill", "decode")
        for timed in results
        if (seconds := getattr(timed, phase))
    ]
    times = [time for _, row in rows for time in row]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    high = max(high, low + 1)

    def x(time: float) -> float:
        return _LEFT + (_WIDTH - 2 * _LEFT) * (math.log10(time) - low) / (high - low)

    bottom = _ROW * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 45}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Time of every call</title>",
        f'<rect width="{_WIDTH}" height="{bottom + 45}" fill="#fff"/>',
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<path d="M{at:.1f} 5V{bottom}" stroke="#d5dbe3"/><text x="{at:.1f}" y="{bottom + 17}" '
            f'text-anchor="middle">{10.0**power:g}</text>'
        )
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{bottom + 37}" text-anchor="middle">ms</text>')
    for index, (name, row) in enumerate(rows):
        top, median = _ROW * index, float(np.median(row))
        middle = top + _ROW - 12
        dots = "".join(f'<circle cx="{x(time):.1f}" cy="{middle}" r="3"/>' for time in row)
        parts.append(
            f'<text x="{_LEFT}" y="{top + 20}">{escape(name)}: {median:.2f} ms</text>'
            f'<g fill="#1d5fd1" fill-opacity=".35">{dots}</g>'
            f'<path d="M{x(median):.1f} {middle - 7}v14" stroke="#c2560c" stroke-width="2"/>'
        )
    return "\n".join([*parts, "</svg>", ""])


class Bench(Command):
    """Prints a table, and writes JSON and a picture where it is told to."""

    name = "bench"
    takes_packs = True
    help = "time of a prefill and of decode steps"
    description = (
        "Time prefill and decode: min, median, p90 and p99 of 20 times or more, tokens a second, and, "
        "where the CPU runs the ONNX file, the share of the memory's measured speed. Two artifacts "
        "take turns."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What is run, and how often."""
        add = parser.add_argument
        add_runner(parser, default=AUTO)
        for name, default, metavar, text in (
            ("--prompt-len", 128, "P", "tokens of the prefill"),
            ("--gen-len", 32, "G", "decode steps behind it"),
            ("--batch", 1, "B", "sequences at once"),
            ("--rounds", 5, "N", "that are counted, behind one that is not"),
        ):
            add(
                name,
                type=whole_number(1),
                default=default,
                metavar=metavar,
                help=f"{text} (default {default})",
            )
        add("--vs", type=Path, metavar="OUT2", help="another artifact, in turns with this one")
        add("--json", type=Path, metavar="FILE", help="write every time, and the summary")
        add("--plot", type=Path, metavar="FILE", help="write an SVG of every time")

    def run(self, out: Path, args: argparse.Namespace) -> None:
        """Time and print."""
        from calibration.out.manifest import peak_rss
        from plugins.text import printable

        request = BenchRequest(
            outs=[out, *([args.vs] if args.vs else [])],
            runner=args.runner,
            prompt=args.prompt_len,
            new=args.gen_len,
            batch=args.batch,
            rounds=args.rounds,
        )
        for option, path in (("--json", args.json), ("--plot", args.plot)):
            if path is not None:
                check_file(option, path)
        results = bench(request, say=lambda text: print(text, file=sys.stderr, flush=True))
        peak = peak_rss()
        speed = bandwidth()  # whose memory is none of the models'
        print(printable(table(results, speed), keep="\n"))
        print(
            f"{peak / 1e6:.0f} MB at the peak, the whole process{' with both' if args.vs else ''}"
        )
        if args.json:
            rows = [asdict(timed) | {"summary": summary(timed, speed)} for timed in results]
            value = {"bandwidth": speed, "peak_rss": peak, "results": rows}
            args.json.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        if args.plot:
            args.plot.write_text(plot(results), encoding="utf-8")


COMMAND = Bench()
