"""The service among many clients at once, for as long as one likes: good ones, slow ones, ones that
go away, and ones that send what they should not.

python benchmarks/soak.py OUT [--seconds 60] [--clients 64] [--slots 16] [--threads N] [--label NAME]

Each question is asked alone first, greedily. Then every client asks one question after the other, in
one of the ways of `Client`, and every answer must be the text that the question had alone, with as
many tokens; every refusal must have a status that fits and a reason. At the end no text may run, the
server's own counts must be those of the clients, and its memory may not have grown since a third of
the time had passed. Whatever is otherwise ends the benchmark. Writes
benchmarks/results/<processor>-<date>-<label>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import struct
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GROWTH_MB = 4.0  # what the allocator keeps for the next rush
EVERY = 0.25  # seconds between two looks at the memory
PATIENCE = 60.0  # seconds for any one answer


class WrongError(Exception):
    """The server did something else than it should."""


@dataclass(frozen=True)
class Question:
    """A request, and its answer where nothing else ran."""

    path: str
    body: dict[str, Any]
    text: str

    @property
    def tokens(self) -> int:
        """How many the answer has."""
        count: int = self.body["max_tokens"]
        return count


@dataclass
class Soak:
    """What came of it."""

    done: Counter[str] = field(default_factory=Counter)  # requests by the client's way
    refused: Counter[str] = field(default_factory=Counter)  # refusals by code
    whole: int = 0  # requests that were answered to their end
    tokens: int = 0  # in them
    memory: list[float] = field(default_factory=list)  # MB, one after the other

    def growth(self) -> float:
        """MB that the last third of the time took more than the second, by the most of each."""
        third = len(self.memory) // 3
        return max(self.memory[-third:]) - max(self.memory[third : 2 * third])


def request(path: str, body: bytes | dict[str, Any], more: str = "") -> bytes:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


# What no client should send, and the status that says so. The connection goes on after these.
REFUSED: list[tuple[bytes, int]] = [
    (request(COMPLETIONS, {"prompt": "x", "n": 10**6}), 400),
    (request(COMPLETIONS, {"prompt": "x", "max_tokens": -1}), 400),
    (request(COMPLETIONS, {"prompt": "x", "temperature": 1e308}), 400),
    (request(COMPLETIONS, {"prompt": "x", "logit_bias": {"-1": 1}}), 400),
    (request(COMPLETIONS, {"prompt": "x", "nonsense": 1}), 400),
    (request(COMPLETIONS, {"prompt": [2**31, -5]}), 400),
    (request(COMPLETIONS, {"prompt": [1] * 10_000}), 400),
    (request(COMPLETIONS, {"prompt": "x", "stop": [""]}), 400),
    (request(COMPLETIONS, {"prompt": ""}), 400),
    (request(COMPLETIONS, b'{"prompt": "\xff\xfe"}'), 400),
    (request(COMPLETIONS, b"[" * 5000), 400),
    (request(COMPLETIONS, b""), 400),
    (request(CHAT, {"messages": [{"role": "robot", "content": "x"}]}), 400),
    (request(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), 400),
    (b"GET /v1/nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (request(COMPLETIONS, {"prompt": "x", "model": "another"}), 404),
    (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"GET /metrics HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 403),
]
# The same, after which the connection is closed.
CLOSED: list[tuple[bytes, set[int]]] = [
    (request("/v1/nowhere", {"prompt": "x"}), {404}),
    (request(COMPLETIONS, b"x" * 5_000_000), {413}),
    (b"GET / HTTP/1.1\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", {431}),
    (request(COMPLETIONS, {"prompt": "x"}, "Transfer-Encoding: chunked\r\n"), {400}),
    (request(COMPLETIONS, {"prompt": "x"}, "Content-Length: 3\r\n"), {400}),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", {400}),
    (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", {400}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {400}),  # TLS
]


class Client:
    """One of them. The name of each way it has of asking begins with `as_`."""

    def __init__(self, port: int, questions: Sequence[Question], number: int, soak: Soak) -> None:
        self._port, self._questions, self._soak = port, questions, soak
        self._random = random.Random(number)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    def ways(cls) -> list[str]:
        return sorted(name for name in vars(cls) if name.startswith("as_"))

    async def run(self, end: float) -> None:
        ways = [*self.ways(), "as_stream", "as_stream", "as_whole"]  # most are good
        while time.monotonic() < end:
            way = self._random.choice(ways)
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                await asyncio.wait_for(getattr(self, way)(), PATIENCE)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                raise WrongError(f"{way}: {type(error).__name__} {error}") from error
            finally:
                self._writer.close()
            self._soak.done[way.removeprefix("as_")] += 1

    def _question(self) -> Question:
        return self._random.choice(self._questions)

    def _ask(self, one: Question, **more: Any) -> None:
        self._writer.write(request(one.path, one.body | more))

    async def _head(self) -> tuple[int, dict[str, str]]:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), fields

    async def _body(self, fields: dict[str, str]) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(
            await self._reader.readexactly(int(fields["content-length"]))
        )
        return body

    async def _refusal(self, expected: set[int]) -> None:
        status, fields = await self._head()
        error = (await self._body(fields)).get("error", {})
        if status not in expected or not error.get("message") or not error.get("code"):
            raise WrongError(f"got {status} {error}, expected one of {expected} with a reason")
        if status == 429 and not int(fields.get("retry-after", 0)):
            raise WrongError(f"got 429 {error} without Retry-After")
        self._soak.refused[error["code"]] += 1

    async def _accepted(self) -> dict[str, str] | None:
        """The fields of an answer; nothing where the queue was full."""
        status, fields = await self._head()
        if status == 200:
            return fields
        error = (await self._body(fields))["error"]
        if status != 429 or not error["message"] or not int(fields["retry-after"]):
            raise WrongError(f"got {status} {error}, expected 200, or 429 and when to come back")
        self._soak.refused[error["code"]] += 1
        return None

    async def _events(self, one: Question, pause: float = 0) -> Any:
        """The events of a stream: text so far, tokens once they are said, and whether it is the last."""
        text = ""
        while size := int(await self._reader.readline(), 16):
            data = await self._reader.readexactly(size + 2)
            for line in data.decode().splitlines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                for choice in event["choices"]:
                    text += choice.get("delta", {}).get("content") or choice.get("text", "")
                yield text, (event.get("usage") or {}).get("completion_tokens")
            if pause:
                await asyncio.sleep(pause)
        await self._reader.readexactly(2)

    def _compare(self, one: Question, text: str, tokens: int | None) -> None:
        if (text, tokens) != (one.text, one.tokens):
            raise WrongError(
                f"{one.body}: got {tokens} tokens, {text!r}, expected {one.tokens}, {one.text!r}"
            )
        self._soak.tokens += one.tokens

    async def _stream(self, pause: float = 0) -> None:
        one = self._question()
        self._ask(one, stream=True, stream_options={"include_usage": True})
        if await self._accepted() is None:
            return
        text, tokens = "", None
        async for text, tokens in self._events(one, pause):  # noqa: B007
            pass
        self._compare(one, text, tokens)
        self._soak.whole += 1

    async def as_stream(self) -> None:
        await self._stream()

    async def as_slow_reader(self) -> None:
        self._shrink()
        await self._stream(pause=0.02)

    async def as_whole(self) -> None:
        """Two, one after the other on one connection."""
        for _ in range(2):
            one = self._question()
            self._ask(one)
            if (fields := await self._accepted()) is None:
                continue
            body = await self._body(fields)
            (choice,) = body["choices"]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            self._compare(one, text, body["usage"]["completion_tokens"])
            self._soak.whole += 1

    async def as_several(self) -> None:
        """Three prompts in one request, of as many tokens as the first."""
        ones = [one for one in self._questions if one.path == COMPLETIONS]
        first = self._random.choice(ones)
        same = [one for one in ones if one.tokens == first.tokens]
        three = [first, *self._random.choices(same, k=2)]
        self._ask(first, prompt=[one.body["prompt"] for one in three])
        if (fields := await self._accepted()) is None:
            return
        body = await self._body(fields)
        for one, choice in zip(three, body["choices"], strict=True):
            self._compare(one, choice["text"], one.tokens)
        if body["usage"]["completion_tokens"] != 3 * first.tokens:
            raise WrongError(f"got {body['usage']}, expected 3 x {first.tokens} tokens")
        self._soak.whole += 1

    async def as_one_who_stops(self) -> None:
        """Closes the connection in the middle of a stream, whose text is right so far."""
        one = self._question()
        self._ask(one, stream=True)
        if await self._accepted() is None:
            return
        left = self._random.randint(1, 8)
        async for text, _ in self._events(one):
            if not one.text.startswith(text):
                raise WrongError(f"{one.body}: got {text!r}, expected {one.text!r}")
            left -= 1
            if not left:
                return

    async def as_one_who_leaves(self) -> None:
        self._ask(self._question(), stream=self._random.random() < 0.5)
        await asyncio.sleep(self._random.random() * 0.1)

    async def as_one_who_vanishes(self) -> None:
        """A reset, as of a machine that has lost its power."""
        await self.as_one_who_leaves()
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )

    async def as_one_who_does_not_read(self) -> None:
        self._shrink()
        self._ask(self._question(), stream=True, n=2)
        await asyncio.sleep(1)

    async def as_half_a_request(self) -> None:
        one = self._question()
        data = request(one.path, one.body)
        self._writer.write(data[: self._random.randrange(len(data))])
        await asyncio.sleep(0.1)

    async def as_rubbish(self) -> None:
        self._writer.write(
            b"\r\n\r\n" + self._random.randbytes(self._random.randint(1, 30_000)) + b"\r\n\r\n"
        )
        await self._refusal({400, 431})

    async def as_wrong(self) -> None:
        for data, status in self._random.sample(REFUSED, 4):
            self._writer.write(data)
            await self._refusal({status, 429})  # where the queue is full nothing is read

    async def as_hostile(self) -> None:
        data, statuses = self._random.choice(CLOSED)
        self._writer.write(data)
        await self._refusal(statuses)

    def _shrink(self) -> None:
        """Lets the kernel take little for it, so that the server has to wait."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


async def _watch(pid: int, soak: Soak) -> None:
    page = os.sysconf("SC_PAGESIZE")
    while True:
        resident = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        soak.memory.append(resident * page / 1e6)
        await asyncio.sleep(EVERY)


def metrics(port: int) -> dict[str, float]:
    """Every number of /metrics, by its name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def outcomes(found: dict[str, float]) -> Counter[str]:
    """Requests for text, by outcome."""
    counts: Counter[str] = Counter()
    for name, value in found.items():
        if name.startswith("anybit_requests_total{"):
            counts[re.findall(r'outcome="(\w+)"', name)[0]] += int(value)
    return counts


def soak(port: int, pid: int, questions: Sequence[Question], clients: int, seconds: float) -> Soak:
    """Let so many clients ask a server for so long.

    Args:
        port: that it listens on, at 127.0.0.1.
        pid: its process.
        questions: with the answers that they have alone.
        clients: at once.
        seconds: after which nobody asks anything more.

    Raises:
        WrongError: an answer, a refusal or a count that should be another, or memory that grew.
    """
    result, before = Soak(), outcomes(metrics(port))

    async def rush() -> None:
        watching = asyncio.create_task(_watch(pid, result))
        end = time.monotonic() + seconds
        crowd = (Client(port, questions, number, result) for number in range(clients))
        async with asyncio.TaskGroup() as group:
            for client in crowd:
                group.create_task(client.run(end))
        watching.cancel()

    try:
        asyncio.run(rush())
    except ExceptionGroup as several:
        raise (several.subgroup(WrongError) or several).exceptions[0] from None
    end = time.monotonic() + PATIENCE
    while (found := metrics(port))["anybit_slots_used"] or found["anybit_queue_length"]:
        if time.monotonic() > end:
            raise WrongError(f"{found['anybit_slots_used']:.0f} slots are still in use")
        time.sleep(0.01)
    counts = outcomes(found) - before
    bad = {name: counts[name] for name in ("failed", "deadline", "shutdown") if counts[name]}
    left = sum(count for way, count in result.done.items() if way.startswith("one_who_"))
    if bad or found["anybit_kv_tokens_used"] or not 0 <= counts["ok"] - result.whole <= left:
        raise WrongError(
            f"got {dict(counts)} by the server and {found['anybit_kv_tokens_used']:.0f} tokens in its "
            f"caches, expected nothing in them, no failure, {result.whole} that are ok, and at most "
            f"{left} more whose clients left too late"
        )
    if result.growth() > GROWTH_MB:
        raise WrongError(f"got {result.growth():.1f} MB more, expected {GROWTH_MB} at most")
    return result


def questions_of(port: int, count: int, *, words: int, tokens: int, chat: bool) -> list[Question]:
    """Questions of very different lengths, with the answers of a server that does nothing else.

    Half of them begin alike, so that one finds the beginning of another in a cache.

    Args:
        port: that the server listens on, at 127.0.0.1.
        count: of questions.
        words: most in one.
        tokens: most in an answer.
        chat: ask every third as a message of a chat.
    """
    from calibration.data import default_text

    text, choose = default_text().split(), random.Random(0)
    found = []
    for i in range(count):
        first = 0 if i % 2 else (i + 1) * words
        prompt = " ".join(text[first : first + max(1, int(words * choose.random() ** 2))])
        body: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
        body["max_tokens"] = max(1, tokens >> choose.randrange(4))
        path = CHAT if chat and i % 3 == 0 else COMPLETIONS
        body |= {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}  # fmt: skip
        ask = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(ask, timeout=PATIENCE) as answer:
            choice = json.loads(answer.read())["choices"][0]
        answered = choice["message"]["content"] if path == CHAT else choice["text"]
        found.append(Question(path, body, answered))
    return found


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from result_file import command_on, write_result
    from service import running, serve_command

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--words", type=int, default=200, help="most in a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="most in an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--label", default="soak")
    args = parser.parse_args()

    queue = str(args.clients - args.slots // 2)  # which is full now and then
    command = serve_command(args.out, args.slots, args.threads, "--queue", queue)
    with running(command) as server:
        questions = questions_of(
            server.port, args.questions, words=args.words, tokens=args.tokens, chat=True
        )
        try:
            found = soak(server.port, server.pid, questions, args.clients, args.seconds)
        except WrongError as error:
            sys.exit(str(error))
        counts = outcomes(metrics(server.port))
    record = {
        "command": command_on("soak.py", args.out),
        "clients": args.clients,
        "slots": args.slots,
        "seconds": args.seconds,
        "requests": dict(sorted(found.done.items())),
        "refusals": dict(sorted(found.refused.items())),
        "outcomes": dict(sorted(counts.items())),
        "tokens_compared": found.tokens,
        "memory_mb": [round(one, 1) for one in found.memory[:: max(1, len(found.memory) // 30)]],
        "growth_mb": round(found.growth(), 2),
    }
    print(json.dumps(record, indent=1))
    write_result(args.label, record)


if __name__ == "__main__":
    main()
