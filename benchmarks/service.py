"""The service under 1, 4 and 16 streams at once, beside other servers with OpenAI's API.

python benchmarks/service.py OUT [--streams 1 4 16] [--tokens 64] [--rounds 3] [--threads N]
    [--peer "llama.cpp=llama-server -m MODEL.gguf --port {port} -np 16 -c 36864 -t 2"] [--label NAME]

--peer is a name and the command of any server that answers /v1/completions on a port that is put in
for {port}; it may be given several times. It should have the same model at about the same bits, as
many slots, as much room in each and as many threads.

The text of each prompt is taken alone first, greedily, and every later one of ours must be the same.
Then all servers, started afresh in each round and taken in turn, answer so many streams at once;
every stream has a prompt of its own of about --prompt words and asks for --tokens tokens, and an
answer of any server that has another number of them, or no text, ends the benchmark:
tokens a second   of all streams together, from the first request to the last token
first token       median seconds from a request to its first text
between tokens    median and 99th percentile of the seconds from one text to the next
Writes benchmarks/results/<processor>-<date>-<label>.json, medians with the least and the largest,
and prints a table; "ratio" is our tokens a second by the peer's, of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_file import command_on, fair_environment, spread, write_result

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
OURS = "anybit"
PATIENCE = 120.0  # seconds for a server to be ready


@dataclass(frozen=True)
class Stream:
    """What came of one request: its text, tokens, and when each piece of text arrived."""

    text: str
    tokens: int
    began: float
    times: list[float]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    port: int
    pid: int


@contextmanager
def running(command: str) -> Iterator[Running]:
    """The server of a command, until the end of the block."""
    port, end = free_port(), time.monotonic() + PATIENCE
    words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(words, stderr=log, stdout=log, env=fair_environment()) as process,
    ):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps({"prompt": "Hello", "max_tokens": 1}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            while True:
                try:
                    with urllib.request.urlopen(request, timeout=PATIENCE):
                        break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        sys.exit(
                            f"{command}: not ready\n{log.read().decode(errors='replace')[-2000:]}"
                        )
                    time.sleep(0.05)
            yield Running(port, process.pid)
        finally:
            process.terminate()


def chunks(pieces: list[tuple[float, bytes]], body: int) -> Iterator[tuple[float, bytes]]:
    """The chunks of an answer in HTTP's chunked form, and when the last byte of each arrived.

    Args:
        pieces: of the answer, as they came, and when.
        body: where the first chunk begins in them all.
    """
    whole = b"".join(data for _, data in pieces)
    ends = list(itertools.accumulate(len(data) for _, data in pieces))
    while True:
        line = whole.index(b"\r\n", body)
        first, size = line + 2, int(whole[body:line], 16)
        if not size:
            return
        arrived, _ = pieces[bisect.bisect_left(ends, first + size)]
        yield arrived, whole[first : first + size]
        body = first + size + 2


async def stream(port: int, body: dict[str, Any]) -> Stream:
    """One streamed completion, on a connection of its own. What comes is read only afterwards: the
    servers should have the cores.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    began = time.perf_counter()
    writer.write(head.encode() + data)
    pieces = [(began, await reader.readuntil(b"\r\n\r\n"))]
    while some := await reader.read(1 << 16):
        pieces.append((time.perf_counter(), some))
    writer.close()
    answer = pieces[0][1].lower()
    if answer.split()[1] != b"200" or b"transfer-encoding: chunked" not in answer:
        sys.exit(f"port {port}: {b''.join(some for _, some in pieces).decode(errors='replace')}")
    text, rest, times, usage = "", b"", [], None
    for arrived, some in chunks(pieces, len(pieces[0][1])):
        *lines, rest = (rest + some).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            piece = event["choices"][0].get("text", "") if event.get("choices") else ""
            if piece:
                text += piece
                times.append(arrived)
    tokens = usage["completion_tokens"] if usage else len(times)
    if not times or tokens != body["max_tokens"]:
        sys.exit(
            f"port {port}: got {tokens} tokens and {len(text)} characters for {body['prompt'][:40]!r}, "
            f"expected {body['max_tokens']} tokens and some text"
        )
    return Stream(text, tokens, began, times)


async def crowd(port: int, prompts: list[str], body: dict[str, Any]) -> list[Stream]:
    """All of them at once."""
    return list(await asyncio.gather(*(stream(port, body | {"prompt": one}) for one in prompts)))


def measured(streams: list[Stream]) -> dict[str, float]:
    gaps = [
        later - sooner
        for one in streams
        for sooner, later in zip(one.times, one.times[1:], strict=False)
    ]
    seconds = max(one.times[-1] for one in streams) - min(one.began for one in streams)
    return {
        "tokens_per_second": sum(one.tokens for one in streams) / seconds,
        "first_token_s": statistics.median(one.times[0] - one.began for one in streams),
        "between_tokens_s": statistics.median(gaps or [0.0]),
        "between_tokens_p99_s": sorted(gaps or [0.0])[int(0.99 * (len(gaps) - 1))],
    }


def prompts_of(count: int, words: int) -> list[str]:
    """Texts that differ from their first word on, so that no cache of a prefix helps."""
    from calibration.data import default_text

    text = default_text().split()
    return [" ".join(text[i * words : (i + 1) * words]) for i in range(count)]


def serve_command(out: Path, slots: int, threads: int, *more: str) -> str:
    """Of anybit-serve, which is compiled if needed, with a place for its port."""
    import onnxruntime

    from deploy.service.build import build_service

    os.environ.setdefault("ANYBIT_ONNXRUNTIME", str(Path(onnxruntime.__file__).parent / "capi"))
    words = [str(build_service()), str(out), "--slots", str(slots), "--threads", str(threads)]
    return f"{shlex.join([*words, *more])} --port {{port}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--label", default="service")
    args = parser.parse_args()

    commands = {OURS: serve_command(args.out, max(args.streams), args.threads)}
    for peer in args.peer:
        name, _, command = peer.partition("=")
        commands[name] = command
    body = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}  # llama.cpp's word too
    texts = iter(prompts_of(sum(args.streams), args.prompt))  # none twice: a cache might know it
    prompts = {count: [next(texts) for _ in range(count)] for count in args.streams}

    with running(commands[OURS]) as server:
        alone = {
            one: asyncio.run(crowd(server.port, [one], body))[0].text
            for some in prompts.values()
            for one in some
        }
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for index in range(args.rounds):
        for name in list(commands)[:: -1 if index % 2 else 1]:
            with running(commands[name]) as server:
                for count in args.streams:
                    asyncio.run(crowd(server.port, ["Hello there"], body))  # to fill caches
                    got = asyncio.run(crowd(server.port, prompts[count], body))
                    if name == OURS:
                        for prompt, one in zip(prompts[count], got, strict=True):
                            if one.text != alone[prompt]:
                                sys.exit(f"{count} streams: another text than alone for {prompt!r}")
                    runs.setdefault((count, name), []).append(measured(got))
    rows = []
    for (count, name), found in runs.items():
        row: dict[str, Any] = {"streams": count, "server": name}
        for what in found[0]:
            values = [run[what] for run in found]
            row[what] = spread(values)
        if name != OURS:
            pairs = zip(runs[count, OURS], found, strict=True)
            row["ratio"] = round(
                statistics.median(
                    a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs
                ),
                3,
            )
        rows.append(row)
        print(
            f"{count:3} streams  {name:20}{row['tokens_per_second'][0]:9.1f} tokens/s  first {row['first_token_s'][0]:.3f} s  "
            f"between {1e3 * row['between_tokens_s'][0]:.1f} ms"
            + (f"  x {row['ratio']:.2f}" if "ratio" in row else ""),
            flush=True,
        )
    record = {
        "command": command_on("service.py", args.out),
        "threads": args.threads,
        "tokens": args.tokens,
        "prompt_words": args.prompt,
        "rows": rows,
    }
    write_result(args.label, record)


if __name__ == "__main__":
    main()
