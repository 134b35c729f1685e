"""The service on a real artifact: the tokens of `python -m deploy generate`, and its command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import REPOSITORY
from tests.deploy.service.conftest import PATIENCE, Server

PROMPTS = [f"The {word} is a thing of number {i}" for i, word in enumerate(("cat", "sea", "law", "old", "sum", "end") * 2)]  # fmt: skip


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served(
    service: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """A service on a copy of the artifact, and the copy."""
    folder = tmp_path_factory.mktemp("served")
    out = Path(shutil.copytree(artifact, folder / "out"))
    import onnxruntime

    env = {"ANYBIT_ONNXRUNTIME": str(Path(onnxruntime.__file__).parent / "capi")}
    words = ("--slots", "4", "--threads", "1")
    server = Server(service, out, *words, log=folder / "log", env=env).listen()
    yield server, out
    assert server.stop() == 0, server.text()
    server.close()


def reference(out: Path, prompt: str, count: int) -> tuple[list[int], str]:
    """The tokens that the Python runner takes, and their text."""
    from deploy.generate import generate_tokens, prompt_tokens
    from deploy.sampling import Sampler, Sampling
    from exporter.run.model import find_model

    model = find_model(out, "native")
    tokenizer = model.tokenizer()
    with model.open() as session:
        tokens = prompt_tokens(tokenizer, prompt, model.description.sizes["vocab_size"])
        made = []
        for token in generate_tokens(session, tokens, Sampler(Sampling()), count):
            if token in model.description.eos_token_ids:
                break
            made.append(token)
    return made, tokenizer.decode(made, skip_special_tokens=True)


def test_the_tokens_of_generate_alone_and_in_a_crowd(served: tuple[Server, Path]) -> None:
    server, out = served
    client = client_of(server)

    def text(prompt: str) -> str:
        got = client.completions.create(
            model=client.models.list().data[0].id, prompt=prompt, max_tokens=24, temperature=0
        )
        return got.choices[0].text

    wanted = [reference(out, prompt, 24)[1] for prompt in PROMPTS[:3]]
    alone = [text(prompt) for prompt in PROMPTS]
    assert alone[:3] == wanted
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(text, PROMPTS)) == alone


def test_the_models_card(served: tuple[Server, Path]) -> None:
    (entry,) = client_of(served[0]).models.list().data
    card: Any = entry.model_extra
    assert card["max_model_len"] == 256
    assert {"bits": "w8a8", "method": "rtn", "proof": "unknown"}.items() <= card["anybit"].items()
    assert card["anybit"]["weight_bytes"] > 10_000 and "ONNX Runtime" in card["anybit"]["backend"]


def test_a_chat_without_a_template(served: tuple[Server, Path]) -> None:
    client = client_of(served[0])
    with pytest.raises(openai.BadRequestError, match="chat") as caught:
        client.chat.completions.create(
            model=client.models.list().data[0].id, messages=[{"role": "user", "content": "x"}]
        )
    assert caught.value.code == "chat_template"


def test_the_artifact_is_removed_underneath(served: tuple[Server, Path], service: Path) -> None:
    """What is loaded is loaded, also for texts that run; a new process says what is missing. The last
    test of this file, as the copy is gone then.
    """
    server, out = served
    client = client_of(server)
    name = client.models.list().data[0].id

    def text(prompt: str) -> str:
        got = client.completions.create(model=name, prompt=prompt, max_tokens=64, temperature=0)
        return got.choices[0].text

    before = [text(prompt) for prompt in PROMPTS]
    made = server.metrics()["anybit_completion_tokens_total"]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        during = [pool.submit(text, prompt) for prompt in PROMPTS]
        server.until(lambda: server.metrics()["anybit_completion_tokens_total"] > made)
        shutil.rmtree(out)
        assert [one.result() for one in during] == before
    assert text("one more") and server.metrics()["anybit_ready"] == 1
    done = subprocess.run(
        [str(service), str(out), "--port", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{out}: got no such folder, expected")


def test_the_command(service: Path, artifact: Path, tmp_path: Path) -> None:
    """python -m deploy serve becomes the program, with what is behind OUT."""
    program = Path(sys.executable)
    words = ("-m", "deploy", "serve", str(artifact), "--port", "0", "--slots", "1")
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(program), *words],
            stderr=file,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
    server = Server.__new__(Server)
    server.process, server._log = process, log
    try:
        client = client_of(server.listen())
        assert client.completions.create(model=client.models.list().data[0].id, prompt="x").choices
        assert server.lines("listening")[0]["pid"] == process.pid
        assert server.stop() == 0
    finally:
        process.kill()
        process.wait(PATIENCE)


def test_the_commands_help_is_the_programs(service: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "serve", "OUT", "--help"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0 and "--api-key" in done.stdout and "--drain-timeout" in done.stdout
