"""Many clients at once, good, slow, rude and gone. ANYBIT_SOAK=60 runs for so many seconds each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.soak import CHAT, COMPLETIONS, Client, Question, WrongError, questions_of, soak
from tests.deploy.service.conftest import Server, chat_prompt, expected

CLIENTS, SLOTS = 64, 16
SECONDS = float(os.environ.get("ANYBIT_SOAK", "0"))
WORDS = ("--slots", str(SLOTS), "--queue", str(CLIENTS - SLOTS // 2))


def hold(server: Server, questions: list[Question], seconds: float) -> None:
    """No token is lost, doubled or another's, every slot comes back, and memory stays."""
    found = soak(server.port, server.process.pid, questions, CLIENTS, SECONDS or seconds)
    assert found.done.keys() == {way.removeprefix("as_") for way in Client.ways()}
    assert server.stop() == 0 and not server.lines("exception")


def test_all_of_them_at_once(serve: Callable[..., Server]) -> None:
    questions = []
    for i in range(100):
        tokens = 1 + 37 * i % 150
        prompt = f"question {i} " * (1 + i % 20)
        common = {"max_tokens": tokens, "temperature": 0}
        questions += [
            Question(COMPLETIONS, {"prompt": prompt, **common}, expected(prompt, tokens)),
            Question(
                CHAT,
                {"messages": [{"role": "user", "content": prompt}], **common},
                expected(chat_prompt(prompt), tokens),
            ),
        ]
    hold(serve(*WORDS, fake={"step_us": 100}), questions, 4)


@pytest.mark.parametrize(
    ("tokens", "text"), [(3, expected("x", 3)[:-1] + "?"), (2, expected("x", 3))]
)
def test_a_token_that_is_wrong_or_doubled_is_noticed(
    serve: Callable[..., Server], tokens: int, text: str
) -> None:
    server = serve()
    question = Question(COMPLETIONS, {"prompt": "x", "max_tokens": tokens}, text)
    with pytest.raises(WrongError, match=rf"got {tokens} tokens, .*, expected {tokens}, '"):
        soak(server.port, server.process.pid, [question], 4, 5)


@pytest.mark.slow
def test_all_of_them_on_a_model(
    service: Path, export: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With the native kernels, whose every token must be the one that the question gets alone."""
    import onnxruntime

    out = export(tiny_model_dir, tmp_path / "out", static_cache=True, max_seq=256)
    env = {"ANYBIT_ONNXRUNTIME": str(Path(onnxruntime.__file__).parent / "capi")}
    server = Server(service, out, *WORDS, "--threads", "1", log=tmp_path / "log", env=env).listen()
    try:
        hold(server, questions_of(server.port, 40, words=20, tokens=64, chat=False), 9)
    finally:
        server.close()
