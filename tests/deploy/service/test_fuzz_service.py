"""Whatever a client sends, it gets an answer with a reason, and the next one is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.deploy.service.conftest import Server, expected
from tests.deploy.service.test_http import Raw, error_of, get, post
from tests.fuzz_cases import VALUES, fuzzed

FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "n", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs",
    "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "best_of", "echo",
    "suffix", "tools", "tool_choice", "response_format", "user", "metadata", "ignore_eos",
    "stop_token_ids", "x",
)  # fmt: skip
json_values = st.recursive(
    st.sampled_from(VALUES) | st.integers(-300, 300) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
parts = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", 1])}, optional={"text": json_values}
    ),
    max_size=3,
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "", "robot"]) | json_values,
            "content": st.text(max_size=40) | parts | json_values,
            "name": json_values,
            "tool_calls": json_values,
        },
    ),
    max_size=5,
)  # fmt: skip
GOOD = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def server(
    service: Path, fake_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "fake.json").write_text(json.dumps({"step_us": 0, "context": 64}))
    words = ("--slots", "64", "--client-timeout", "0.2", "--max-body", "64")
    env = {"LD_PRELOAD": str(fake_engine)}
    one = Server(service, folder, *words, log=folder / "log", env=env).listen()
    yield one
    assert one.stop() == 0
    assert not one.lines("exception")
    one.close()


def check(server: Server, path: str, body: dict[str, Any]) -> None:
    with Raw(server) as raw:
        status, fields, answer = raw.send(
            post(body).replace(b"/v1/completions", path.encode(), 1)
        ).answer()
        if status != 200:
            assert status in (400, 404) and error_of(answer)["message"].count(". ") >= 1
            assert fields["connection"] == "keep-alive"
        elif fields["content-type"].startswith("text/event-stream"):
            assert answer.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(answer)["object"] in ("chat.completion", "text_completion")
        assert raw.send(get("/health")).answer()[0] == 200


@fuzzed
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4), st.booleans())
def test_any_value_in_any_field(server: Server, fields: dict[str, Any], chat: bool) -> None:
    left_out = {"prompt"} if chat else {"messages"}
    body = {name: value for name, value in (GOOD | fields).items() if name not in left_out}
    check(server, "/v1/chat/completions" if chat else "/v1/completions", body)


@fuzzed
@given(messages)
def test_any_messages(server: Server, said: list[dict[str, Any]]) -> None:
    check(server, "/v1/chat/completions", {"messages": said, "max_tokens": 2})


@fuzzed
@given(st.data())
def test_damaged_bytes(server: Server, data: st.DataObject) -> None:
    """A good request with bytes changed, left out or put in, in as many packets as may be."""
    whole = bytearray(post({"prompt": "x", "max_tokens": 2}) + get("/health"))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "put", "double"]))
        if kind == "change":
            whole[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del whole[place : place + data.draw(st.integers(1, 20))]
        elif kind == "put":
            whole[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            whole[place:place] = whole[place : place + 40]
        whole = whole or bytearray(b"x")
    with Raw(server) as raw:
        place = data.draw(st.integers(0, len(whole)))
        for part in (whole[:place], whole[place:]):
            try:
                raw.send(bytes(part))
            except OSError:  # it has answered and closed
                break
        raw.socket.shutdown(1)
        try:
            answer = raw.file.read()
        except OSError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    with Raw(server) as raw:
        got = raw.send(post({"prompt": "still", "max_tokens": 2})).answer()[2]
        assert json.loads(got)["choices"][0]["text"] == expected("still", 2)
