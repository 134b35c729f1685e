"""Many clients at once, good, slow, rude and gone. ANYBIT_SOAK=60 runs for so many seconds."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable

from tests.deploy.service.conftest import Server, chat_prompt, expected
from tests.deploy.service.test_http import get, post

CLIENTS = 64
SECONDS = float(os.environ.get("ANYBIT_SOAK", "3"))
GROWTH = 4e6  # bytes; what the allocator keeps for the next rush


class Client:
    """One of them: a connection for each request, unless it is kept."""

    def __init__(self, server: Server, number: int, done: Counter[str]) -> None:
        self.server, self.number, self.done = server, number, done
        self.random = random.Random(number)

    async def run(self, end: float) -> None:
        count = 0
        while time.monotonic() < end:
            count += 1
            kind = self.random.choice(
                [
                    "stream",
                    "stream",
                    "whole",
                    "whole",
                    "leave",
                    "reset",
                    "slow",
                    "rubbish",
                    "wrong",
                    "idle",
                ]
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            try:
                await getattr(self, kind)(f"{self.number}-{count}", reader, writer)
                self.done[kind] += 1
            finally:
                writer.close()

    def request(self, prompt: str, tokens: int, stream: bool) -> tuple[bytes, str]:
        """A request in one of two forms, and the text that belongs to it."""
        if self.random.random() < 0.5:
            body = {"prompt": prompt, "max_tokens": tokens, "stream": stream}
            return post(body), expected(prompt, tokens)
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "stream": stream,
        }
        data = post(body).replace(b"/v1/completions", b"/v1/chat/completions")
        return data, expected(chat_prompt(prompt), tokens)

    async def head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), fields

    async def events(self, reader: asyncio.StreamReader, pause: float = 0) -> list[str]:
        """The new text of each event of a stream, to its end."""
        status, _ = await self.head(reader)
        assert status == 200
        texts = []
        while size := int(await reader.readline(), 16):
            data = await reader.readexactly(size + 2)
            for line in data.decode().splitlines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    texts.append(choice.get("delta", {}).get("content") or choice.get("text", ""))
            if pause:
                await asyncio.sleep(pause)
        return texts

    async def stream(
        self,
        prompt: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pause: float = 0,
    ) -> None:
        data, text = self.request(prompt, self.random.randint(1, 120), True)
        writer.write(data)
        got = await self.events(reader, pause)
        assert "".join(got) == text

    async def slow(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.stream(prompt, reader, writer, pause=0.01)

    async def whole(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for part in ("a", "b"):
            data, text = self.request(prompt + part, self.random.randint(1, 200), False)
            writer.write(data)
            status, fields = await self.head(reader)
            choice = json.loads(await reader.readexactly(int(fields["content-length"])))["choices"][
                0
            ]
            assert status == 200
            assert (choice.get("text") or choice["message"]["content"]) == text

    async def leave(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(self.request(prompt, 4000, self.random.random() < 0.5)[0])
        await asyncio.sleep(self.random.random() * 0.05)

    async def reset(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.leave(prompt, reader, writer)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async def rubbish(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"\r\n\r\n" + self.random.randbytes(self.random.randint(1, 30_000)))
        assert (await self.head(reader))[0] in (400, 431)

    async def wrong(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for data, status in (
            (post({"prompt": prompt, "n": 99}), 400),
            (post(b"[" * 5000), 400),
            (get("/nowhere"), 404),
            (post(b"x" * 100_000), 413),
        ):
            writer.write(data)
            got, fields = await self.head(reader)
            error = json.loads(await reader.readexactly(int(fields["content-length"])))["error"]
            assert got == status and error["message"]

    async def idle(
        self, prompt: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(post({"prompt": prompt})[:50])
        await asyncio.sleep(0.05)


def test_all_of_them_at_once(serve: Callable[..., Server]) -> None:
    """No token is lost, doubled or another's, every slot comes back, and memory stays."""
    server = serve("--slots", "16", "--queue", "1000", "--max-body", "64", fake={"step_us": 100})
    done: Counter[str] = Counter()

    async def rush(seconds: float) -> None:
        end = time.monotonic() + seconds
        clients = [Client(server, number, done) for number in range(CLIENTS)]
        await asyncio.gather(*(client.run(end) for client in clients))

    memory = []
    for seconds in (SECONDS / 3, SECONDS / 3, SECONDS / 3):
        asyncio.run(rush(seconds))
        server.until_idle()
        memory.append(server.metrics()["process_resident_memory_bytes"])
    found = server.metrics()
    assert len(done) == 8 and min(done.values()) >= 3, done
    assert memory[-1] - memory[0] < GROWTH, (memory, done)
    whole = done["stream"] + done["slow"] + 2 * done["whole"]
    ends = {
        outcome: sum(
            found.get(f'anybit_requests_total{{endpoint="{endpoint}",outcome="{outcome}"}}', 0)
            for endpoint in ("chat", "completions")
        )
        for outcome in ("ok", "client_gone", "failed", "slow_client")
    }
    assert ends["ok"] == whole and ends["failed"] == ends["slow_client"] == 0
    assert ends["client_gone"] <= done["leave"] + done["reset"]
    assert found["anybit_kv_tokens_used"] == 0
    assert server.stop() == 0 and not server.lines("exception")
