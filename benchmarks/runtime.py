"""The C++ runtime: how soon the first token comes, what the engine costs beside the model,
and how many requests at once pay.

python benchmarks/runtime.py OUT [--streams 1 4 16] [--tokens 64] [--rounds 3] [--threads 0] [--label NAME]
                                [--backend auto] [--like onnxruntime]

OUT is an artifact up to its ONNX file; one with --kv static:1024 or more computes many requests in
one call. Each round is a process of its own for each number of streams, in turn, through the C
interface:
first     seconds from before the library is opened to the first token of a short prompt
tokens    a second, of all streams together, greedy, after prompts of 32 tokens; the prompts' time is
          left out
overhead  the engine's own time as a part of the model's, with a callback in C++ that notes the token
Before that the tokens of all streams are compared with those of each prompt alone. With --like BACKEND
those of another backend are counted that are the same, up to the first of each text that is not.
Writes
benchmarks/results/<processor>-<date>-<label>.json, medians with the least and the largest, and prints
a table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from result_file import command_on, spread, write_result

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 32


class Options(ctypes.Structure):
    """The beginning of anybit_options."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("slots", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("chunk", ctypes.c_int),
        ("memory_limit", ctypes.c_size_t),
        ("verify", ctypes.c_int),
        ("onnxruntime", ctypes.c_char_p),
        ("kernels", ctypes.c_char_p),
    ]


class TokenLog(ctypes.Structure):
    """TokenLog of token_log.cpp."""

    _fields_ = [
        ("times", ctypes.POINTER(ctypes.c_double)),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("count", ctypes.c_size_t),
    ]


class Request(ctypes.Structure):
    """anybit_request."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("token_count", ctypes.c_size_t),
        ("text", ctypes.c_char_p),
        ("max_new_tokens", ctypes.c_int),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int),
        ("repetition_penalty", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("bias_tokens", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("bias_count", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        ("logprobs", ctypes.c_int),
        ("stop", ctypes.c_void_p),
        ("stop_count", ctypes.c_size_t),
        ("stop_tokens", ctypes.c_void_p),
        ("stop_token_count", ctypes.c_size_t),
        ("ignore_end", ctypes.c_int),
        ("on_token", ctypes.c_void_p),
        ("on_finish", ctypes.c_void_p),
        ("user", ctypes.c_void_p),
    ]


class Runtime:
    """An engine on OUT, through libanybit.so."""

    def __init__(
        self, library: str, log: str, out: Path, slots: int, threads: int, backend: str
    ) -> None:
        self._library = ctypes.CDLL(library)
        self._note = ctypes.CDLL(log).note_token
        for name in ("anybit_open", "anybit_submit", "anybit_stats"):
            getattr(self._library, name).restype = ctypes.c_void_p
        self._error = ctypes.c_char_p()
        options = Options(
            size=ctypes.sizeof(Options),
            backend=backend.encode(),
            slots=slots,
            threads=threads,
            chunk=256,
            onnxruntime=os.environ["ANYBIT_ONNXRUNTIME"].encode(),
            kernels=os.environ["ANYBIT_KERNELS"].encode(),
        )
        self._engine = ctypes.c_void_p(
            self._library.anybit_open(
                str(out).encode(), ctypes.byref(options), ctypes.byref(self._error)
            )
        )
        if not self._engine:
            sys.exit((self._error.value or b"").decode())

    def stats(self) -> dict[str, Any]:
        text = ctypes.string_at(self._library.anybit_stats(self._engine, None))
        found: dict[str, Any] = json.loads(text)
        return found

    def run(
        self, prompts: list[list[int]], count: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The new tokens of each prompt, and when they came."""
        answers = [(ctypes.c_int32 * count)() for _ in prompts]
        times = [(ctypes.c_double * count)() for _ in prompts]
        logs = [TokenLog(*arrays, 0) for arrays in zip(times, answers, strict=True)]
        handles = []
        for prompt, log in zip(prompts, logs, strict=True):
            request = Request()
            self._library.anybit_request_init(
                None, ctypes.byref(request), ctypes.c_size_t(ctypes.sizeof(request))
            )
            array = (ctypes.c_int32 * len(prompt))(*prompt)
            request.tokens, request.token_count = array, len(prompt)
            request.max_new_tokens, request.ignore_end = count, 1
            request.on_token = ctypes.cast(self._note, ctypes.c_void_p)
            request.user = ctypes.addressof(log)
            handle = self._library.anybit_submit(
                self._engine, ctypes.byref(request), ctypes.byref(self._error)
            )
            if not handle:
                sys.exit((self._error.value or b"").decode())
            handles.append(ctypes.c_void_p(handle))
        for handle in handles:
            self._library.anybit_wait(handle, None, None)
            self._library.anybit_release(handle)
        return [list(each) for each in answers], [list(each) for each in times]

    def close(self) -> None:
        self._library.anybit_close(self._engine)


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    """Of tokens that no two share the beginning of."""
    return [
        [(7919 * (i + 1) + 104729 * j) % (vocab - 300) + 200 for j in range(PROMPT_TOKENS)]
        for i in range(count)
    ]


def measure(
    library: str, log: str, out: Path, streams: int, tokens: int, threads: int, backend: str
) -> dict[str, Any]:
    """In a process of its own."""
    vocab = json.loads((out / "onnx" / "model.json").read_text())["sizes"]["vocab_size"]
    prompts = prompts_of(streams, vocab)
    began = time.perf_counter()
    runtime = Runtime(library, log, out, streams, threads, backend)
    _, ((first,),) = runtime.run([prompts[0][:5]], 1)
    found: dict[str, Any] = {"first_token_seconds": first - began}
    before = runtime.stats()
    answers, times = runtime.run(prompts, tokens)
    after = runtime.stats()
    found["answers"] = answers
    # From when the last prompt had been computed.
    begun, ended = max(each[0] for each in times), max(each[-1] for each in times)
    made = sum(moment > begun for each in times for moment in each)
    found["tokens_per_second"] = made / (ended - begun)
    spent = after["model_s"] - before["model_s"]
    found["overhead"] = (after["engine_s"] - before["engine_s"]) / spent
    runtime.close()
    return found


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many tokens are the same, up to the first of each text that is not."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(ours, theirs, strict=True)
    )
    return f"{same} of {sum(map(len, ours))} tokens"


def child(
    libraries: tuple[str, str], out: Path, streams: int, args: argparse.Namespace, backend: str
) -> dict[str, Any]:
    """Measure in a new process."""
    import onnxruntime

    from plugins.tools.build import build_onnxruntime

    (runtime,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    environment = {
        **os.environ,
        "ANYBIT_ONNXRUNTIME": str(runtime),
        "ANYBIT_KERNELS": str(build_onnxruntime()),
    }
    options = ["--tokens", args.tokens, "--threads", args.threads, "--backend", backend]
    options += ["--one", streams, *libraries]
    result = subprocess.run(
        [sys.executable, __file__, str(out), *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if result.returncode != 0:
        sys.exit(f"{streams} streams: {result.stderr.strip()}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--label", default="runtime")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--like", metavar="BACKEND", help="count the tokens that are another's too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        streams, *libraries = args.one
        found = measure(*libraries, args.out, int(streams), args.tokens, args.threads, args.backend)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder) / "token_log.so")


def compare(args: argparse.Namespace, log: Path) -> None:
    """The rounds, in processes of their own, with the callback compiled into `log`."""
    sys.path.insert(0, str(HERE.parent))
    from deploy.runtime.build import build_runtime

    headers = HERE.parent / "deploy" / "runtime" / "include"
    source = str(HERE / "token_log.cpp")
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{headers}"]
    subprocess.run(["g++", *flags, source, "-o", str(log)], check=True)
    libraries = (str(build_runtime()), str(log))
    runs: dict[int, list[dict[str, Any]]] = {streams: [] for streams in args.streams}
    for _ in range(args.rounds):
        for streams in args.streams:
            runs[streams].append(child(libraries, args.out, streams, args, args.backend))
    most = max(runs[max(runs)], key=lambda run: len(run["answers"]))["answers"]
    for found in (run for several in runs.values() for run in several):
        answers = found.pop("answers")
        if answers != most[: len(answers)]:
            sys.exit(f"{len(answers)} streams give other tokens than {len(most)}")
    if args.like:
        other = child(libraries, args.out, len(most), args, args.like)["answers"]
        print(f"as {args.like}: {agreement(most, other)}", flush=True)
    rows = []
    for streams, several in runs.items():
        row: dict[str, Any] = {"streams": streams}
        for name in several[0]:
            values = [run[name] for run in several]
            row[name] = spread(values)
        rows.append(row)
        print(
            f"{streams:3} streams  first token {row['first_token_seconds'][0]:.2f} s  "
            f"{row['tokens_per_second'][0]:8.1f} tokens/s  overhead {row['overhead'][0]:.2%}",
            flush=True,
        )
    write_result(args.label, {"command": command_on("runtime.py", args.out), "rows": rows})


if __name__ == "__main__":
    main()
