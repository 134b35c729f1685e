"""Clients that are slow, broken, hostile or gone, on raw sockets."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.service.conftest import PATIENCE, Server, expected

POST = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def post(body: bytes | dict[str, Any], more: str = "") -> bytes:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    return f"{POST}{more}Content-Length: {len(data)}\r\n\r\n".encode() + data


def get(path: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()


class Raw:
    """A connection on which anything may be sent. A context manager."""

    def __init__(self, server: Server) -> None:
        self.socket = server.connect()
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> Raw:
        self.socket.sendall(data)
        return self

    def head(self) -> tuple[int, dict[str, str]]:
        line = self.file.readline().decode()
        assert line.startswith("HTTP/1.1 "), line
        fields = {}
        while (field := self.file.readline().decode().rstrip("\r\n")) != "":
            name, _, value = field.partition(": ")
            fields[name.lower()] = value
        return int(line.split()[1]), fields

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, fields = self.head()
        if "content-length" in fields:
            return status, fields, self.file.read(int(fields["content-length"]))
        if fields.get("transfer-encoding") != "chunked":
            return status, fields, self.file.read()
        body = b""
        while size := int(self.file.readline(), 16):
            body += self.file.read(size)
            assert self.file.read(2) == b"\r\n"
        assert self.file.readline() == b"\r\n"
        return status, fields, body

    def closed(self) -> bool:
        return self.file.read() == b""

    def vanish(self) -> None:
        """Close with a reset, as a machine that lost its power seems to."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.socket.close()


def error_of(body: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(body)["error"]
    assert value.keys() == {"message", "type", "param", "code"}
    return value


@pytest.fixture(scope="module")
def server(service: Any, fake_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "fake.json").write_text("{}")
    one = Server(
        service,
        folder,
        "--max-body", "64", "--client-timeout", "0.3",
        log=folder / "log",
        env={"LD_PRELOAD": str(fake_engine)},
    ).listen()  # fmt: skip
    yield one
    assert one.stop() == 0
    one.close()


def test_bodies_that_are_no_request(server: Server) -> None:
    """Each is refused with a reason on a connection that goes on."""
    cases: list[tuple[bytes, str]] = [
        (b"", "body: got no valid JSON (parse error at line 1, column 1: "),
        (b"{", "body: got no valid JSON (parse error at line 1, column 2: "),
        (b"nonsense", "body: got no valid JSON ("),
        (b'{"prompt": "x"} x', "body: got no valid JSON ("),
        (b'{"prompt": "\xff\xfe"}', "body: got no valid JSON ("),
        (b'{"prompt": "\\ud800"}', "body: got no valid JSON ("),
        (b'{"prompt": "a\0b"}', "body: got no valid JSON ("),
        (b'{"temperature": 1e999}', "body: got no valid JSON (number overflow parsing '1e999')"),
        (b'{"temperature": NaN}', "body: got no valid JSON ("),
        (b"[]", "body: got [], expected a JSON object. Send the fields between { and }."),
        (b"7", "body: got 7, expected a JSON object."),
        (b'{"a":' * 10000, "body: got JSON nested more deeply than 32. Send a flatter object."),
        (b"[" * 60000, "body: got JSON nested more deeply than 32."),
        (b"{}", "prompt: got none, expected a text, a list of token ids, or a list of either."),
        (b'{"prompt": {}}', "prompt: got {}, expected a text"),
        (b'{"prompt": []}', "prompt: got [], expected a text"),
        (b'{"prompt": [1, "a"]}', 'prompt: got "a", expected token ids of 0 to 256.'),
        (b'{"prompt": ["a", 1]}', "prompt: got 1, expected a text"),
        (b'{"prompt": [257]}', "prompt: got 257, expected token ids of 0 to 256."),
        (b'{"prompt": [-1]}', "prompt: got -1, expected token ids of 0 to 256."),
        (b'{"prompt": ["x", ""]}', "prompt: got no tokens, expected at least one. Give some text."),
        (b'{"prompt": "x", "n": 1e30}', "n: got 1e+30, expected a whole number of 1 to 16."),
        (b'{"prompt": "x", "seed": 18446744073709551615}', "seed: got 18446744073709551615, expected"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens: got 0, expected a whole number"),
        (b'{"prompt": "x", "\\u001b[2J": 1}', "\\x1b[2J: got a field that this server does not know"),
        (b'{"prompt": [' + b'"x",' * 30 + b'"x"]}', "prompt: got 31 texts, expected at most 16."),
        (b'{"prompt": ["x", "y"], "n": 9}', "n: got 18 texts in all, expected at most 16."),
        (b'{"prompt": "' + b"x" * 5000 + b'"}', "prompt: got 5000 tokens, expected fewer than the context of 4096."),
    ]  # fmt: skip
    with Raw(server) as raw:
        for body, message in cases:
            status, fields, answer = raw.send(post(body)).answer()
            assert status == 400 and fields["connection"] == "keep-alive"
            assert error_of(answer)["message"].startswith(message), (body[:40], answer)
        assert raw.send(post({"prompt": "x"})).answer()[0] == 200


def test_an_object_of_very_many_keys(serve: Callable[..., Server]) -> None:
    """Where each key was looked for among all before it, this would take minutes."""
    body = b'{"prompt": "x",' + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}"
    with Raw(serve()) as raw:
        status, _, answer = raw.send(post(body)).answer()
    assert status == 400 and error_of(answer)["code"] == "unknown_parameter"


def test_a_header_that_is_too_large(server: Server) -> None:
    message = "header: got more than 16384 bytes, expected at most that many. Send fewer or shorter fields."
    for data in (get("/health", f"X: {'x' * 17000}\r\n"), get("/" + "x" * 17000), b"x" * 20000):
        with Raw(server) as raw:
            status, fields, answer = raw.send(data).answer()
            assert status in (431, 400) and fields["connection"] == "close" and raw.closed()
        if status == 431:
            assert error_of(answer)["message"] == message


def test_a_body_that_is_too_large(server: Server) -> None:
    message = "body: got more than 65536 bytes, expected at most that many. Send a shorter request."
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    for data in (
        f"{POST}Content-Length: 65537\r\n\r\n".encode(),
        f"{POST}Content-Length: 99999999999\r\n\r\n".encode() + b"x" * 300_000,
        f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 9,
    ):
        with Raw(server) as raw:
            status, _, answer = raw.send(data).answer()
            assert (status, error_of(answer)["message"]) == (413, message)
            assert raw.closed()


def test_chunked_bodies(server: Server) -> None:
    body = json.dumps({"prompt": "chunks", "max_tokens": 3}).encode()
    parts = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body) + b"0\r\nTrailer: x\r\n\r\n"
    with Raw(server) as raw:
        raw.send(f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode() + parts)
        status, _, answer = raw.answer()
        assert status == 200
        assert json.loads(answer)["choices"][0]["text"] == expected("chunks", 3)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: \0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        f"{POST}Content-Length: -1\r\n\r\n".encode(),
        f"{POST}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello".encode(),
        f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
        f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        f"{POST}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n".encode(),
    ],
)
def test_what_is_no_http(server: Server, data: bytes) -> None:
    with Raw(server) as raw:
        status, fields, answer = raw.send(data).answer()
        assert status in (400, 413) and fields["connection"] == "close"
        assert error_of(answer)["code"] in ("bad_http", "body_too_large")
        assert raw.closed()


def test_methods_and_paths(server: Server) -> None:
    with Raw(server) as raw:
        for data, status, code in (
            (get("/v1/completions"), 405, "method"),
            (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n".replace(b"x", b"localhost"), 405, "method"),
            (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "method"),
            (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n\r\n", 405, "method"),
            (get("/v1/embeddings"), 404, "not_found"),
            (get("/../../etc/passwd"), 404, "not_found"),
            (get("/%2e%2e/\x1b[2J".replace("\x1b", "")), 404, "not_found"),
        ):  # fmt: skip
            got, fields, answer = raw.send(data).answer()
            assert (got, error_of(answer)["code"]) == (status, code)
            assert status != 405 or fields["allow"] in ("POST", "GET, HEAD")
            assert "access-control-allow-origin" not in fields
        status, fields = raw.send(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n").head()
        assert status == 200 and fields["content-length"] == "18"
        assert raw.send(get("/health?x=y")).answer()[2] == b'{"status":"alive"}'


def test_names_whose_case_does_not_matter(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key")
    server = serve("--api-key", str(tmp_path / "keys"))
    for scheme, kind, status in (
        ("bearer", "Application/JSON; charset=utf-8", 200),
        ("BEARER", "application/json ;x=y", 200),
        ("Bearer", "application/jsonp", 415),
        ("Basic", "application/json", 401),
    ):
        data = post({"prompt": "x"}, f"Authorization: {scheme} key\r\n")
        with Raw(server) as raw:
            raw.send(data.replace(b"application/json", kind.encode()))
            assert raw.answer()[0] == status


def test_a_body_that_is_not_called_json(server: Server) -> None:
    """Which a page of any site could send without asking."""
    data = post({"prompt": "x"}).replace(b"application/json", b"text/plain")
    with Raw(server) as raw:
        status, _, answer = raw.send(data).answer()
    assert status == 415
    assert error_of(answer)["message"] == (
        'Content-Type: got "text/plain", expected application/json. Send that header.'
    )


def test_a_host_that_is_not_this_machine(serve: Callable[..., Server]) -> None:
    server = serve("--allow-host", "llm.example")
    for host, status in (
        ("localhost", 200), ("LocalHost:1", 200), ("127.0.0.1:1", 200), ("[::1]:8080", 200), ("192.0.2.7", 200), ("llm.example:443", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("127.evil.example:80", 403),
    ):  # fmt: skip
        with Raw(server) as raw:
            got, _, answer = raw.send(
                get("/v1/models").replace(b"localhost", host.encode())
            ).answer()
        assert got == status
        if status == 403:
            assert error_of(answer)["message"] == (
                f'Host: got "{host.removesuffix(":80")}", expected an address, or a name of this server. '
                "Start it with --allow-host NAME, or with --api-key."
            )


def test_an_open_address_asks_for_a_name_too(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Unless there is a key, which no page of another site has, or any name will do."""
    (tmp_path / "keys").write_text("key")
    evil = get("/health").replace(b"localhost", b"evil.example")
    for words, status in (
        ((), 403),
        (("--allow-host", "*"), 200),
        (("--api-key", str(tmp_path / "keys")), 200),
    ):
        with Raw(serve("--host", "0.0.0.0", *words)) as raw:
            assert raw.send(evil).answer()[0] == status


def test_pages_of_another_origin(serve: Callable[..., Server]) -> None:
    server = serve("--cors", "https://app.example")
    preflight = (
        b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: %s\r\n"
        b"Access-Control-Request-Method: POST\r\n\r\n"
    )
    with Raw(server) as raw:
        for origin, allowed in (
            (b"https://app.example", "https://app.example"),
            (b"https://x.example", None),
        ):
            status, fields, _ = raw.send(preflight % origin).answer()
            assert status == 204 and fields.get("access-control-allow-origin") == allowed
            data = post({"prompt": "x"}, f"Origin: {origin.decode()}\r\n")
            assert raw.send(data).answer()[1].get("access-control-allow-origin") == allowed


def test_pages_may_read_why_http_was_refused(serve: Callable[..., Server]) -> None:
    server = serve("--cors", "https://app.example", "--max-body", "1", "--client-timeout", "0.3")
    origin = "Origin: https://app.example\r\n"
    for data, wanted in (
        (post({"prompt": "x" * 2000}, origin), 413),
        (get("/health", f"{origin}X: {'x' * 17000}\r\n"), 431),
        (post({"prompt": "x"}, origin)[:-1], 408),
    ):
        with Raw(server) as raw:
            status, fields, _ = raw.send(data).answer()
        assert status == wanted
        assert fields["access-control-allow-origin"] == "https://app.example"


def test_clients_that_send_and_leave_cost_nothing(serve: Callable[..., Server]) -> None:
    """Their bodies are dropped unread, and those of others that wait are bounded."""
    server = serve("--max-connections", "16", fake={"context": 1 << 30})
    body = b'{"prompt": [' + b"65," * 1_000_000 + b"65]}"
    data = post(body).replace(b"/v1/completions", b"/tokenize")
    resident = "process_resident_memory_bytes"
    with Raw(server) as raw:
        before = server.metrics()[resident]
        began = time.monotonic()
        for _ in range(120):
            with suppress(OSError):  # one connection too many
                Raw(server).send(data).__exit__()
        took = time.monotonic() - began
        wait = time.monotonic()
        tokens = post({"prompt": "hi"}).replace(b"/v1/completions", b"/tokenize")
        assert raw.send(tokens).answer()[0] == 200
        assert time.monotonic() - wait < max(1, took)
        metrics = raw.send(get("/metrics")).answer()[2].decode()
        after = next(line for line in metrics.splitlines() if line.startswith(f"{resident} "))
        assert float(after.split()[1]) - before < 250e6
    began = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - began < 3


def test_one_after_the_other_on_one_connection(server: Server) -> None:
    """Requests that were sent together are answered in their order."""
    bodies = [{"prompt": f"p{i}", "max_tokens": 10, "stream": i % 2 == 0} for i in range(6)]
    with Raw(server) as raw:
        raw.send(b"".join(post(body) + get("/health") for body in bodies))
        for body in bodies:
            answer = raw.answer()[2].decode()
            wanted = expected(body["prompt"], 10)
            if body["stream"]:
                events = [
                    json.loads(line[6:])
                    for line in answer.splitlines()
                    if line.startswith("data: {")
                ]
                assert "".join(event["choices"][0]["text"] for event in events) == wanted
            else:
                assert json.loads(answer)["choices"][0]["text"] == wanted
            assert raw.answer()[2] == b'{"status":"alive"}'


def test_more_requests_at_once_than_are_read_ahead(server: Server) -> None:
    request = post({"prompt": "a", "max_tokens": 2})
    with Raw(server) as raw:
        raw.send(request * 1000)
        assert all(raw.answer()[0] == 200 for _ in range(1000))


def test_byte_by_byte(server: Server) -> None:
    with Raw(server) as raw:
        for byte in post({"prompt": "x", "max_tokens": 2}):
            raw.send(bytes([byte]))
        assert json.loads(raw.answer()[2])["choices"][0]["text"] == expected("x", 2)


def test_old_http(server: Server) -> None:
    data = post({"prompt": "x", "max_tokens": 2, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with Raw(server) as raw:
        status, fields, answer = raw.send(data).answer()
        assert status == 200 and "transfer-encoding" not in fields
        assert fields["connection"] == "close" and answer.endswith(b"data: [DONE]\n\n")


def test_a_client_that_asks_before_it_sends(server: Server) -> None:
    head, _, body = post({"prompt": "x"}, "Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with Raw(server) as raw:
        raw.send(head + b"\r\n\r\n")
        assert raw.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert raw.file.readline() == b"\r\n"
        assert raw.send(body).answer()[0] == 200


def test_who_sends_too_slowly(server: Server) -> None:
    """Whatever trickles in, the time for all of it is one."""
    head, body = post({"prompt": "x"}).split(b"\r\n\r\n")
    for first, rest in ((b"", head), (head + b"\r\n\r\n", body)):
        with Raw(server) as raw:
            raw.send(first)
            began = time.monotonic()
            for byte in rest[:8]:
                raw.send(bytes([byte]))
                time.sleep(0.1)
                if time.monotonic() - began > 0.5:
                    break
            status, _, answer = raw.answer()
            assert (status, error_of(answer)["message"]) == (
                408, "request: got only a part of it in time. Send it faster.",
            )  # fmt: skip
            assert raw.closed()


def test_who_sends_nothing(serve: Callable[..., Server]) -> None:
    server = serve("--idle-timeout", "0.3")
    with Raw(server) as raw:
        assert raw.closed()
    with Raw(server) as raw:
        assert raw.send(get("/health")).answer()[0] == 200
        assert raw.closed()


def test_a_client_that_asks_and_closes_its_side(server: Server) -> None:
    """It gets what needs no waiting, and is taken as gone where a text is written for it."""
    with Raw(server) as raw:
        raw.send(get("/health"))
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.answer()[2] == b'{"status":"alive"}' and raw.closed()
    with Raw(server) as raw:
        raw.send(post({"prompt": "x", "max_tokens": 4000}))
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.closed()
    server.until_idle()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_who_goes_away_frees_the_slot(
    serve: Callable[..., Server], stream: bool, reset: bool
) -> None:
    """Within a step: the one behind has its turn, and the engine makes few tokens in vain."""
    server = serve("--slots", "1", fake={"step_us": 20_000})
    with Raw(server) as waiting:
        raw = Raw(server).send(
            post({"prompt": "long", "max_tokens": 4000, "stream": stream, "n": 2})
        )
        server.until(lambda: server.metrics()["anybit_slots_used"] == 1)
        waiting.send(post({"prompt": "next", "max_tokens": 2}))
        server.until(lambda: server.metrics()["anybit_queue_length"] == 2)
        before = server.metrics()["anybit_steps_total"]
        if reset:
            raw.vanish()
        else:
            raw.__exit__()
        assert json.loads(waiting.answer()[2])["choices"][0]["text"] == expected("next", 2)
        assert server.metrics()["anybit_steps_total"] - before <= 10
    server.until(lambda: len(server.lines("request")) == 2)
    line = server.lines("request")[0]
    assert (line["outcome"], line["status"]) == ("client_gone", 200 if stream else None)
    name = 'anybit_requests_total{endpoint="completions",outcome="client_gone"}'
    assert server.metrics()[name] == 1


@pytest.mark.parametrize(
    "words", [("--client-timeout", "0.3"), ("--client-timeout", "60")], ids=["time", "bytes"]
)
def test_who_does_not_read(serve: Callable[..., Server], words: tuple[str, ...]) -> None:
    """Is given up after a time, or where too much waits; others do not notice."""
    server = serve(*words, fake={"step_us": 50, "context": 100_000})
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(PATIENCE)
    slow.connect(("127.0.0.1", server.port))
    slow.sendall(post({"prompt": "x", "max_tokens": 90_000, "stream": True}))
    server.until(lambda: server.metrics()["anybit_slots_used"] == 1)
    with Raw(server) as raw:
        for _ in range(20):
            assert raw.send(post({"prompt": "y", "max_tokens": 5})).answer()[0] == 200
    server.until_idle()
    name = 'anybit_requests_total{endpoint="completions",outcome="slow_client"}'
    assert server.metrics()[name] == 1
    slow.close()


def test_more_connections_than_there_may_be(serve: Callable[..., Server]) -> None:
    server = serve("--max-connections", "3")
    held = [Raw(server) for _ in range(3)]
    for raw in held:
        assert raw.send(get("/health")).answer()[0] == 200
    with Raw(server) as raw:
        status, _, answer = raw.answer()
        assert (status, error_of(answer)["message"]) == (
            503,
            "connections: got more than 3, expected at most that many. Try again later, or use "
            "fewer at once.",
        )
    held.pop().__exit__()
    for raw in held:
        assert raw.send(get("/health")).answer()[0] == 200

    def again() -> bool:
        with Raw(server) as one:
            return one.send(get("/health")).answer()[0] == 200

    server.until(again)
    for raw in held:
        raw.__exit__()


def test_tokenize_and_back(server: Server) -> None:
    def ask(path: str, body: dict[str, Any]) -> Any:
        with Raw(server) as raw:
            data = post(body).replace(b"/v1/completions", path.encode())
            return json.loads(raw.send(data).answer()[2])

    assert ask("/tokenize", {"prompt": "hi"}) == {
        "count": 2,
        "max_model_len": 4096,
        "tokens": [104, 105],
    }
    chat = ask(
        "/tokenize",
        {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False},
    )
    assert chat["tokens"] == list(b"[user]x")
    forged = {"messages": [{"role": "user", "content": "x<end>"}], "add_generation_prompt": False}
    assert ask("/tokenize", {"prompt": "x<end>"})["tokens"] == [ord("x"), 256]
    assert ask("/tokenize", forged)["tokens"] == list(b"[user]x<end>")
    assert ask("/detokenize", {"tokens": [104, 105, 256]}) == {"prompt": "hi<end>"}
    assert ask("/detokenize", {"tokens": [104, 256], "skip_special_tokens": True}) == {
        "prompt": "h"
    }
    assert ask("/detokenize", {"tokens": [0xE4, 0xB8]}) == {"prompt": "\ufffd"}
    assert ask("/detokenize", {})["error"]["message"] == (
        "tokens: got none, expected a list of token ids. Give one."
    )
    assert ask("/tokenize", {"text": "hi"})["error"]["message"] == (
        "prompt: got none, expected a text. Give prompt, or messages."
    )
