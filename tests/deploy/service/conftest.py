"""The service on an engine that needs no model, and a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

HERE = Path(__file__).parent
PATIENCE = 20.0  # seconds, for what takes milliseconds on a machine with nothing else to do
_MASK = (1 << 64) - 1


def expected(prompt: str | bytes, count: int, seed: int = 0) -> str:
    """The text that fake_engine.cpp makes of a prompt."""
    value = 0xCBF29CE484222325 ^ seed
    for byte in prompt.encode() if isinstance(prompt, str) else prompt:
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    letters = []
    for n in range(count):
        x = (value + n * 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        letters.append(chr(ord("a") + (x >> 33) % 26))
    return "".join(letters)


def chat_prompt(text: str) -> str:
    """What the template of fake_engine.cpp makes of one message of a user."""
    return f"[user]{text}[assistant]"


class Server:
    """A running anybit-serve. Its log is read from a file."""

    def __init__(
        self, program: Path, out: Path, *words: str, log: Path, env: dict[str, str], **popen: Any
    ) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(program), str(out), "--port", "0", *words],
                stderr=file,
                stdout=subprocess.PIPE,
                env={**os.environ, **env},
                **popen,
            )
        self.port = 0

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The log's lines so far, of one event."""
        found = []
        for line in self._log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a last line that is not whole yet
                found.append(json.loads(line))
        return [line for line in found if event in ("", line["event"])]

    def text(self) -> str:
        """The log as it is."""
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of an event."""
        self.until(lambda: self.lines(event) or self.process.poll() is not None)
        lines = self.lines(event)
        assert lines, self.text()
        return lines[0]

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until it is true."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)

    def listen(self, *, ready: bool = True) -> Server:
        """Wait until it answers."""
        self.port = self.wait_for("listening")["port"]
        if ready:
            self.wait_for("ready")
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A connection, with a limit of time."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """Every line of /metrics."""
        import urllib.request

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def until_idle(self) -> None:
        """Wait until no text runs or waits."""

        def idle() -> bool:
            found = self.metrics()
            return not found["anybit_slots_used"] and not found["anybit_queue_length"]

        self.until(idle)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """End it, however it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@pytest.fixture(scope="session")
def service() -> Path:
    """The program, with the libraries that it needs beside it."""
    from deploy.service.build import build_service

    return build_service()


@pytest.fixture(scope="session")
def fake_engine(service: Path) -> Path:
    """A libanybit.so that takes the place of the real one."""
    from deploy.runtime.build import header_folder
    from plugins.tools.recipe import Recipe, make

    runtime = REPOSITORY / "deploy" / "runtime"
    json_folder = header_folder("nlohmann_json", "nlohmann/json.hpp")
    compiler = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-pthread"]
    compiler += [f"-I{runtime}/include", f"-I{runtime}/src", "-isystem", str(json_folder)]
    sources = [HERE / "fake_engine.cpp", runtime / "src/error.cpp", runtime / "src/unicode.cpp"]
    return make(
        Recipe(
            root=REPOSITORY,
            name="libanybit.so",
            folders=[service.parent / "fake-engine"],
            compiles={str(source.relative_to(REPOSITORY)): compiler for source in sources},
            link=["g++", "-shared", "-pthread", "-Wl,-soname,libanybit.so", "{}"],
            include=["deploy/runtime/include", "deploy/runtime/src"],
        )
    )


@pytest.fixture
def serve(service: Path, fake_engine: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """serve("--slots", "2", fake={"step_us": 100}, wait=True, **Popen) -> a running service on the
    fake engine.
    """
    running: list[Server] = []

    def start(
        *words: str, fake: dict[str, Any] | None = None, wait: bool = True, **popen: Any
    ) -> Server:
        out = tmp_path / f"out{len(running)}"
        out.mkdir()
        (out / "fake.json").write_text(json.dumps(fake or {}))
        env = {"LD_PRELOAD": str(fake_engine)}
        log = tmp_path / f"log{len(running)}"
        running.append(Server(service, out, *words, log=log, env=env, **popen))
        return running[-1].listen() if wait else running[-1]

    yield start
    for server in running:
        server.close()
