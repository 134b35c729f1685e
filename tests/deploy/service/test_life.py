"""How the service begins and ends, and what it does where the machine gives it less than it wants."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import REPOSITORY
from tests.deploy.service.conftest import PATIENCE, Server, expected
from tests.deploy.service.test_http import Raw, error_of, get, post


def fetch(server: Server, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(server.url + path, timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_it_answers_while_the_model_is_loading(serve: Callable[..., Server]) -> None:
    server = serve(fake={"load_ms": 600}, wait=False).listen(ready=False)
    assert fetch(server, "/health") == (200, {"status": "alive"})
    status, body = fetch(server, "/ready")
    assert (status, body["error"]["message"]) == (
        503, "server: it is loading the model. Try again soon.",
    )  # fmt: skip
    with Raw(server) as raw:
        status, fields, _ = raw.send(post({"prompt": "x"})).answer()
        assert status == 503 and fields["retry-after"] == "1"
    server.wait_for("ready")
    assert fetch(server, "/ready") == (200, {"status": "ready"})


def test_a_lost_device(serve: Callable[..., Server]) -> None:
    """Other texts end as they can, nothing new is taken, and the exit code asks to be started again."""
    server = serve(fake={"step_us": 5000})
    other = Raw(server).send(post({"prompt": "x", "max_tokens": 400}))
    lost = Raw(server).send(post({"prompt": "LOSE=2", "max_tokens": 9}))
    asking, posting = Raw(server), Raw(server)
    assert asking.send(get("/ready")).answer()[0] == posting.send(get("/ready")).answer()[0] == 200
    status, _, body = lost.answer()
    assert (status, error_of(body)["message"]) == (
        500, "step: the device is lost, as the prompt asked",
    )  # fmt: skip
    assert asking.send(get("/ready")).answer()[0] == 503
    status, _, body = posting.send(post({"prompt": "y"})).answer()
    assert (status, error_of(body)["code"]) == (503, "draining")
    status, _, body = other.answer()
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, expected("x", 400))
    assert server.process.wait(PATIENCE) == 1
    assert server.lines("lost")[0]["problem"] == "got a lost device, as a prompt asked"
    assert server.text().endswith("engine: got a lost device, as a prompt asked. Start again.\n")


def test_without_cuda_graphs(serve: Callable[..., Server]) -> None:
    assert serve().wait_for("ready")["backend"] == "none auto"
    assert serve("--no-cuda-graphs").wait_for("ready")["backend"] == "none auto, no CUDA graphs"


def test_a_signal_while_the_model_is_loading(serve: Callable[..., Server]) -> None:
    server = serve(fake={"load_ms": 60_000}, wait=False).listen(ready=False)
    assert server.stop() == 0
    assert [line["event"] for line in server.lines()] == ["listening", "draining", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_running_texts_end(serve: Callable[..., Server], number: int) -> None:
    """Streamed and whole, in a slot and before it; nothing new begins; the exit code is 0."""
    server = serve("--slots", "2", fake={"step_us": 2000})
    bodies = [{"prompt": f"p{i}", "max_tokens": 100, "stream": i % 2 == 0} for i in range(4)]
    raws = [Raw(server).send(post(body)) for body in bodies]
    idle = Raw(server)
    assert idle.send(get("/health")).answer()[0] == 200
    server.until(lambda: server.metrics()["anybit_queue_length"] == 2)
    server.process.send_signal(number)
    server.wait_for("draining")
    assert fetch(server, "/health")[0] == 200
    status, body = fetch(server, "/ready")
    assert (status, body["error"]["code"]) == (503, "draining")
    status, fields, answer = idle.send(post({"prompt": "new"})).answer()
    assert (status, fields["connection"]) == (503, "close")
    assert error_of(answer)["message"] == (
        "server: it is shutting down. Send the request to another one."
    )
    for raw, request in zip(raws, bodies, strict=True):
        text = raw.answer()[2].decode()
        if request["stream"]:
            assert text.endswith("data: [DONE]\n\n")
            events = [
                json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")
            ]
            text = "".join(event["choices"][0]["text"] for event in events)
        else:
            text = json.loads(text)["choices"][0]["text"]
        assert text == expected(str(request["prompt"]), 100)
    assert server.process.wait(PATIENCE) == 0
    assert server.lines()[-1]["event"] == "stopped"
    for raw in (*raws, idle):
        raw.__exit__()


def test_a_drain_has_a_deadline(serve: Callable[..., Server]) -> None:
    """What runs on is told why it ends."""
    server = serve("--drain-timeout", "0.2", fake={"step_us": 5000})
    stream, whole = (
        Raw(server).send(post({"prompt": "x", "max_tokens": 4000, "stream": stream}))
        for stream in (True, False)
    )
    server.until(lambda: server.metrics()["anybit_slots_used"] == 2)
    server.process.send_signal(signal.SIGTERM)
    last = stream.answer()[2].decode().splitlines()[-2]
    message = "server: it is shutting down. Send the request to another one."
    assert error_of(last.removeprefix("data: ").encode())["message"] == message
    status, _, answer = whole.answer()
    assert (status, error_of(answer)["message"]) == (503, message)
    assert server.process.wait(PATIENCE) == 0
    assert {line["outcome"] for line in server.lines("request")} == {"shutdown"}
    stream.__exit__()
    whole.__exit__()


def test_a_second_signal_ends_it_at_once(serve: Callable[..., Server]) -> None:
    server = serve(fake={"step_us": 50_000})
    with Raw(server) as raw:
        raw.send(post({"prompt": "x", "max_tokens": 4000, "stream": True}))
        server.until(lambda: server.metrics()["anybit_slots_used"] == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        assert server.stop() == 0


def test_drain_under_load(serve: Callable[..., Server]) -> None:
    """Clients that go on asking get whole texts or a refusal, and no text is cut."""
    server = serve("--slots", "8", fake={"step_us": 300})
    outcomes: list[str] = []

    def ask(i: int) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for j in range(1000):
            try:
                got = client.completions.create(model="fake", prompt=f"{i} {j}", max_tokens=50)
                assert got.choices[0].text == expected(f"{i} {j}", 50)
                outcomes.append("whole")
            except (openai.InternalServerError, openai.APIConnectionError) as error:
                outcomes.append(type(error).__name__)
                return

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    server.until(lambda: len(outcomes) > 30)
    assert server.stop() == 0
    for thread in threads:
        thread.join(PATIENCE)
    assert len(outcomes) - outcomes.count("whole") == 8
    done = [line for line in server.lines("request") if line["status"] == 200]
    assert len(done) == outcomes.count("whole") and {line["outcome"] for line in done} == {"ok"}


def texts_in(server: Server) -> float:
    """How many run or wait."""
    found = server.metrics()
    return found["anybit_slots_used"] + found["anybit_queue_length"]


def test_a_kill_under_load(serve: Callable[..., Server]) -> None:
    """No answer that was cut looks whole, and the next process has the port at once."""
    server = serve("--slots", "4", fake={"step_us": 3000})
    streams = [True, True, True, False, False, False]  # two of them wait for a slot
    raws = []
    for i, stream in enumerate(streams):
        raws.append(
            Raw(server).send(post({"prompt": f"p{i}", "max_tokens": 4000, "stream": stream}))
        )
        server.until(lambda: texts_in(server) == len(raws))
    server.until(lambda: server.metrics()["anybit_completion_tokens_total"] > 40)
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    for i, (raw, stream) in enumerate(zip(raws, streams, strict=True)):
        got = raw.file.read().decode()
        if stream:
            assert "[DONE]" not in got and not got.endswith("0\r\n\r\n")
            lines = [line[6:] for line in got.splitlines() if line.startswith("data: {")]
            text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
            assert text and expected(f"p{i}", 4000).startswith(text)
        else:
            assert got == ""
        raw.__exit__()
    assert serve("--port", str(server.port)).port == server.port


def test_a_request_has_a_deadline(serve: Callable[..., Server]) -> None:
    server = serve("--timeout", "0.2", fake={"step_us": 5000})
    message = "request: got no end within 0.2 seconds, the server's deadline. Ask for fewer tokens, or try later."
    for stream in (True, False):
        with Raw(server) as raw:
            raw.send(post({"prompt": "x", "max_tokens": 4000, "stream": stream}))
            status, _, answer = raw.answer()
            if stream:
                answer = answer.splitlines()[-2].removeprefix(b"data: ")
            assert (status, error_of(answer)["message"]) == (200 if stream else 504, message)


def test_a_long_wait_is_not_silent(serve: Callable[..., Server]) -> None:
    """A stream without tokens has comments, which clients pass over."""
    server = serve("--keep-alive", "0.05", fake={"step_us": 200_000})
    with Raw(server) as raw:
        raw.send(post({"prompt": "x", "max_tokens": 2, "stream": True}))
        assert raw.answer()[2].startswith(b": still at it\n\n")


# ---------------------------------------------------------------- what it refuses to begin with


def fails(service: Path, *words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [str(service), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **(env or {})},
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith('{"time"')]
    return done.returncode, "\n".join(errors)


def test_a_port_in_use(serve: Callable[..., Server], service: Path, fake_engine: Path) -> None:
    """Is said before the model is opened, which may take long."""
    port = serve().port
    code, said = fails(
        service, "nowhere", "--port", str(port), env={"LD_PRELOAD": str(fake_engine)}
    )
    assert (code, said) == (
        1,
        f"--port: got 127.0.0.1:{port} (Address already in use), expected one that is free. "
        "Stop what uses it, or give another with --host and --port.",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("OUT", "--port", "99999"), "Could not convert: --port = 99999"),
        (("OUT", "--slots", "0"), "--slots: Value 0 not in range [1 - 1024]"),
        (("OUT", "--backend", "cuda"), "--backend: cuda not in {auto,tensorrt,onnxruntime}"),
        (("OUT", "--prot", "1"), "anybit-serve: The following arguments were not expected: --prot 1. anybit-serve --help lists the options."),
        ((), "OUT is required"),
        (("OUT", "--timeout", "nan"), "--timeout: got nan, expected a number. anybit-serve --help lists the options."),
        (("OUT", "--timeout", "0"), "--timeout: Value 0 not in range [0.001 - 1e+06]"),
        (("OUT", "--memory", "17592186044416"), "--memory: Value 17592186044416 not in range [0 - 1073741824]"),
        (("OUT", "--cors", "https://app.example/"), '--cors: got "https://app.example/", expected *, or an origin as browsers name it, in lower case and without a path or its scheme\'s own port, such as https://app.example. anybit-serve --help lists the options.'),
        (("OUT", "--cors", "app.example"), '--cors: got "app.example", expected *, or an origin'),
        (("OUT", "--cors", "https://App.example"), '--cors: got "https://App.example", expected *, or an origin'),
        (("OUT", "--cors", "https://app.example:443"), '--cors: got "https://app.example:443", expected *, or an origin'),
        (("OUT", "--cors", "null"), '--cors: got "null", expected *, or an origin'),
        (("OUT", "--host", "not a host"), "--host: got not a host (Host not found (authoritative)), expected an address of this machine. Give one, such as 127.0.0.1, or 0.0.0.0 for all."),
        (("OUT", "--log", "/nowhere/log"), "--log: got /nowhere/log (No such file or directory), expected a file to append to. Check the folder and its permissions."),
        (("OUT", "--api-key", "/dev/null"), "--api-key: got /dev/null, which cannot be read or is empty, expected a key a line. Write one into it, such as: openssl rand -hex 32 > /dev/null."),
        (("OUT", "--port", "0"), "OUT/fake.json: got no such file, expected it. Write one."),
    ],
)  # fmt: skip
def test_what_it_cannot_begin_with(
    service: Path, fake_engine: Path, words: tuple[str, ...], said: str
) -> None:
    code, message = fails(service, *words, env={"LD_PRELOAD": str(fake_engine)})
    assert code == 2
    assert message.splitlines()[0].startswith(said), message


def test_help_and_version(service: Path) -> None:
    found = [
        subprocess.run([str(service), word], capture_output=True, text=True, check=True).stdout
        for word in ("-h", "--help", "--version")
    ]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert found[0] == found[1] and "--drain-timeout" in found[0]
    assert found[2] == f"anybit-serve {project['project']['version']}\n"


def test_no_name_of_a_folder(service: Path) -> None:
    """As where a variable of a script is not set."""
    assert fails(service, "", "--port", "0") == (
        2,
        "folder: got an empty name, expected an artifact folder. Make one with: python -m exporter "
        "MODEL --wbits W --abits A --out DIR.",
    )


def test_a_failure_to_load_is_said_where_the_log_is_a_file(
    service: Path, fake_engine: Path, tmp_path: Path
) -> None:
    words = ("OUT", "--port", "0", "--log", str(tmp_path / "log"))
    code, message = fails(service, *words, env={"LD_PRELOAD": str(fake_engine)})
    assert (code, message) == (2, "OUT/fake.json: got no such file, expected it. Write one.")


# ---------------------------------------------------------------- a machine that gives less


def test_few_files(serve: Callable[..., Server]) -> None:
    """Connections beyond what the process may open are told so; it goes on, and so do the others."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

    server = serve(preexec_fn=limit)
    raws = [Raw(server) for _ in range(100)]
    answered = refused = 0
    for raw in raws:
        raw.socket.settimeout(0.3)
        try:
            status = raw.send(get("/health")).head()[0]
        except (OSError, AssertionError):
            continue
        answered += status == 200
        refused += status == 503
    assert answered == 16 and refused >= 1  # 80, less 32 for others and 32 to be told
    for raw in raws:
        raw.__exit__()
    server.until(lambda: fetch(server, "/health")[0] == 200)
    assert server.process.poll() is None


def test_no_file_is_left(serve: Callable[..., Server]) -> None:
    """Where others have taken them all, a new connection waits, and those that are there go on."""
    server = serve()
    with Raw(server) as old, Raw(server) as new:
        assert old.send(get("/health")).answer()[0] == 200
        pid = server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        most = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()) + 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, limits[1]))
        with Raw(server) as newest:
            newest.send(get("/health"))
            problem = server.wait_for("accept")["problem"]
            assert problem == "Too many open files"
            assert old.send(post({"prompt": "x", "max_tokens": 9})).answer()[0] == 200
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            assert newest.answer()[0] == new.send(get("/health")).answer()[0] == 200


def test_the_disk_of_the_log_is_full(serve: Callable[..., Server], tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full, which is a disk that is full")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve("--log", "/dev/full", "--port", str(port), wait=False)
    server.port = port

    def answers() -> bool:
        try:
            return fetch(server, "/ready")[0] == 200
        except OSError:
            return False

    server.until(answers)
    with Raw(server) as raw:
        for _ in range(5):
            assert raw.send(post({"prompt": "x"})).answer()[0] == 200
    server.until(lambda: server.metrics()["anybit_log_lines_lost_total"] >= 5)
    assert server.stop() == 0


def test_a_line_that_is_there_in_part_stays_alone(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """A disk that is full for a while cuts one line; the next begins on a line of its own."""

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    log = tmp_path / "log"
    server = serve("--log", str(log), wait=False, preexec_fn=full)
    server._log = log
    server.until(log.exists)
    server.listen()
    with Raw(server) as raw:
        for _ in range(10):
            assert raw.send(get("/nowhere")).answer()[0] == 404
        server.until(lambda: server.metrics()["anybit_log_lines_lost_total"] > 0)
        assert log.stat().st_size == 1000
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
        for _ in range(3):
            assert raw.send(get("/nowhere")).answer()[0] == 404
    assert server.stop() == 0
    starts = [line.count('{"time"') for line in log.read_text().splitlines()]
    assert set(starts) == {1} and len(starts) == len(server.lines()) + 1


def test_nobody_reads_the_log(
    serve: Callable[..., Server], service: Path, fake_engine: Path, tmp_path: Path
) -> None:
    """A full pipe does not stop the service, nor does one whose reader has gone."""
    (tmp_path / "fake.json").write_text("{}")
    read, write = os.pipe()
    process = subprocess.Popen(
        [str(service), str(tmp_path), "--port", "0"],
        stderr=write,
        env={**os.environ, "LD_PRELOAD": str(fake_engine)},
    )
    os.close(write)
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(read, 1)
        server = Server.__new__(Server)
        server.port, server.process = json.loads(line)["port"], process
        server._log = tmp_path / "fake.json"
        with Raw(server) as raw:
            for _ in range(400):  # of about 300 bytes each; a pipe holds 64 KB
                assert raw.send(get("/nowhere")).answer()[0] == 404
        os.close(read)
        with Raw(server) as raw:
            for _ in range(20):
                assert raw.send(get("/nowhere")).answer()[0] == 404
        server.until(lambda: server.metrics()["anybit_log_lines_lost_total"] > 0)
        assert server.stop() == 0
    finally:
        process.kill()
        process.wait()


def test_a_log_that_is_moved_away(serve: Callable[..., Server], tmp_path: Path) -> None:
    log, moved = tmp_path / "log", tmp_path / "log.1"
    server = serve("--log", str(log), wait=False)
    server._log = log
    server.until(log.exists)
    server.listen()
    log.rename(moved)
    server.process.send_signal(signal.SIGHUP)
    server.until(lambda: log.exists() and server.lines("reopened"))
    assert server.stop() == 0
    assert [line["event"] for line in server.lines()] == ["reopened", "draining", "stopped"]
    server._log = moved
    assert [line["event"] for line in server.lines()] == ["listening", "ready"]


def test_every_address_of_a_name(serve: Callable[..., Server]) -> None:
    """localhost is ::1 too, where the machine has it."""
    found = socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)
    server = serve("--host", "localhost")
    answered = 0
    for address in {entry[4][0] for entry in found}:
        try:
            socket.create_server(
                (address, 0), family=socket.AF_INET6 if ":" in str(address) else socket.AF_INET
            ).close()
        except OSError:
            continue
        with socket.create_connection((address, server.port), timeout=PATIENCE) as one:
            one.sendall(get("/health"))
            assert one.recv(12) == b"HTTP/1.1 200"
        answered += 1
    assert answered


def test_an_open_address_without_a_key_is_warned_of(serve: Callable[..., Server]) -> None:
    server = serve("--host", "0.0.0.0")
    assert server.wait_for("open")["problem"] == (
        "anybody who reaches 0.0.0.0 may use this server: give --api-key"
    )


def test_metrics_are_what_prometheus_reads(serve: Callable[..., Server]) -> None:
    server = serve("--name", 'a "model"')
    with Raw(server) as raw:
        assert raw.send(post({"prompt": "x", "max_tokens": 3})).answer()[0] == 200
        status, fields, body = raw.send(get("/metrics")).answer()
    assert status == 200 and fields["content-type"].startswith("text/plain; version=0.0.4")
    kinds, lines = {}, body.decode().splitlines()
    for line in lines:
        if line.startswith("# TYPE "):
            kinds[line.split()[2]] = line.split()[3]
    found = [line for line in lines if not line.startswith("#")]
    assert (
        'anybit_model_info{model="a \\"model\\"",bits="w4a8",backend="none auto",proof="passed"} 1'
        in found
    )
    for line in found:
        name = line.split("{")[0].split(" ")[0]
        base = name
        for suffix in ("_bucket", "_sum", "_count"):
            if name.endswith(suffix) and name.removesuffix(suffix) in kinds:
                base = name.removesuffix(suffix)
        assert base in kinds, line
        float(line.rpartition(" ")[2])
    buckets = [
        line for line in found if line.startswith("anybit_time_between_tokens_seconds_bucket")
    ]
    counts = [float(line.rpartition(" ")[2]) for line in buckets]
    assert counts == sorted(counts) and counts[-1] == 2 and 'le="+Inf"' in buckets[-1]
    assert "anybit_completion_tokens_total 3" in found
