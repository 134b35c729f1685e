"""The official Python client of OpenAI's API, as people use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from tests.deploy.service.conftest import Server, chat_prompt, expected

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(
    service: Path, fake_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One for all tests that ask for nothing special."""
    folder = tmp_path_factory.mktemp("openai")
    (folder / "fake.json").write_text("{}")
    env = {"LD_PRELOAD": str(fake_engine)}
    one = Server(service, folder, log=folder / "log", env=env).listen()
    yield one
    assert one.stop() == 0
    one.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "anybit")
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt/x")
    assert caught.value.body == {
        "message": 'model: got "gpt/x", expected fake. Give that name.',
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_a_completion(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt="hello", max_tokens=5)
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (
        expected("hello", 5),
        "length",
        None,
    )
    assert got.id.startswith("cmpl-") and got.object == "text_completion" and got.model == "fake"
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (
        5,
        5,
        10,
    )


def test_sixteen_tokens_unless_asked(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="x").choices[0].text == expected("x", 16)


def test_a_completion_as_a_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="END=7",
            max_tokens=50,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected("END=7", 7)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 7 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 7
    assert len({c.id for c in chunks}) == 1


def test_a_chat(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=6)
    message = got.choices[0].message
    assert (message.role, message.content) == ("assistant", expected(chat_prompt("hello"), 6))
    assert got.choices[0].finish_reason == "length" and got.object == "chat.completion"


def test_a_chat_goes_on_to_its_end(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "END=300"}]
    )
    assert got.choices[0].message.content == expected(chat_prompt("END=300"), 300)
    assert got.choices[0].finish_reason == "stop"


def test_a_chat_as_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=6, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == expected(chat_prompt("hello"), 6)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(c.usage is None for c in chunks)


def test_the_clients_own_streaming_helper(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "END=4"}]
    with client.chat.completions.stream(model="fake", messages=messages) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == expected(chat_prompt("END=4"), 4)


def test_roles_and_parts_of_messages(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "me",
        },
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "c"},
    ]
    got = client.chat.completions.create(model="fake", messages=messages, max_tokens=3)
    prompt = "[system]be brief[user]ab[assistant][user]c[assistant]"
    assert got.choices[0].message.content == expected(prompt, 3)


def test_several_choices_and_seeds(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        got = client.completions.create(
            model="fake", prompt="x", max_tokens=20, temperature=1, **more
        )
        assert got.usage is not None and got.usage.prompt_tokens == 1
        assert [c.index for c in got.choices] == list(range(len(got.choices)))
        return [c.text for c in got.choices]

    several = texts(n=3, seed=7)
    assert several == texts(n=3, seed=7) and len(set(several)) == 3
    assert texts(seed=7) == several[:1] == [expected("x", 20, 7)]
    assert texts() != texts()  # each draws anew
    options: Any = {"model": "fake", "prompt": ["y", "x", "x"], "max_tokens": 20, "temperature": 1}
    got = [c.text for c in client.completions.create(**options, n=3, seed=7).choices]
    assert got[3:6] == got[6:] == several  # whatever stands beside it in the list
    got = [c.text for c in client.completions.create(**options).choices]
    assert got[1] != got[2]


def test_several_choices_in_a_stream(client: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "prompt": ["one", "two"], "n": 2, "seed": 1, "temperature": 1}
    whole = client.completions.create(**options)
    texts = [""] * 4
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert whole.usage is not None and whole.usage.prompt_tokens == 6


def test_prompts_as_tokens(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt=[104, 105], max_tokens=4)
    assert got.choices[0].text == expected("hi", 4)
    got = client.completions.create(model="fake", prompt=[[104], [105, 106]], max_tokens=4)
    assert [c.text for c in got.choices] == [expected("h", 4), expected("ij", 4)]


def test_stop(client: openai.OpenAI) -> None:
    text = expected("x", 30)
    for stop in (text[5:8], ["ZZ", text[5:8]]):
        got = client.completions.create(model="fake", prompt="x", max_tokens=30, stop=stop)
        assert got.choices[0].finish_reason == "stop"
        assert text.startswith(got.choices[0].text) and len(got.choices[0].text) < 8


def test_characters_of_several_tokens(client: openai.OpenAI) -> None:
    """Text comes when it is whole, and its length in tokens is right all the same."""
    got = client.completions.create(model="fake", prompt="WIDE", max_tokens=30)
    assert len(got.choices[0].text) == 10 and got.choices[0].text.isalpha()
    assert got.usage is not None and got.usage.completion_tokens == 30
    chunks = list(
        client.completions.create(model="fake", prompt="WIDE", max_tokens=30, stream=True)
    )
    assert len(chunks) == 11
    assert "".join(c.choices[0].text for c in chunks) == got.choices[0].text


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt="x", max_tokens=3, logprobs=2)
    odds = got.choices[0].logprobs
    assert odds is not None and odds.top_logprobs is not None
    assert odds.tokens == list(expected("x", 3))
    assert odds.token_logprobs == [-0.5] * 3 and odds.text_offset == [0, 1, 2]
    assert [list(top.values()) for top in odds.top_logprobs] == [[-0.5, -1.5]] * 3


def test_logprobs_of_parts_of_characters(client: openai.OpenAI) -> None:
    """Each has its own bytes; where only a name is given, they are in the name."""
    options: Any = {"model": "fake", "max_tokens": 3}
    odds = client.completions.create(**options, prompt="WIDE", logprobs=2).choices[0].logprobs
    assert odds is not None and odds.top_logprobs is not None and odds.tokens is not None
    assert odds.tokens[0] == r"bytes:\xe4" and all(len(top) == 2 for top in odds.top_logprobs)
    messages: Any = [{"role": "user", "content": "WIDE"}]
    got = client.chat.completions.create(**options, messages=messages, logprobs=True).choices[0]
    assert got.logprobs is not None and got.logprobs.content is not None
    parts = [bytes(one.bytes or []) for one in got.logprobs.content]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert b"".join(parts).decode() == got.message.content


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "messages": MESSAGES, "max_tokens": 3, "logprobs": True}
    got = client.chat.completions.create(**options, top_logprobs=2)
    odds = got.choices[0].logprobs
    assert odds is not None and odds.content is not None
    text = expected(chat_prompt("hello"), 3)
    assert [(one.token, one.bytes, one.logprob) for one in odds.content] == [
        (letter, [ord(letter)], -0.5) for letter in text
    ]
    assert [len(one.top_logprobs) for one in odds.content] == [2] * 3
    streamed = [
        one
        for chunk in client.chat.completions.create(**options, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == odds.content
    bare = client.chat.completions.create(**options).choices[0].logprobs
    assert bare is not None and bare.content is not None
    assert [one.top_logprobs for one in bare.content] == [[]] * 3


def test_logit_bias_and_what_others_add(client: openai.OpenAI) -> None:
    got = client.completions.create(
        model="fake",
        prompt="END=2",
        max_tokens=4,
        logit_bias={"65": 100},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        user="me",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "stop_token_ids": [3],
        },
    )
    assert got.choices[0].text == "AAAA"


def test_what_a_chain_of_tools_sends(client: openai.OpenAI) -> None:
    """The fields that libraries on top of this client fill in, null or not, whether used or not."""
    got = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        max_tokens=2,
        n=1,
        stop=None,
        temperature=0.0,
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
        metadata={"chain": "a"},
        store=False,
        reasoning_effort="low",
        verbosity="low",
        service_tier="auto",
        user="u",
    )
    assert got.choices[0].message.content == expected(chat_prompt("hello"), 2)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "got -1, expected a number of 0.0 to 100.0. Give such a number, or leave the field out."),
        ({"top_p": "x"}, "top_p", 'got "x", expected a number of 0.0 to 1.0. Give such a number, or leave the field out.'),
        ({"n": 17}, "n", "got 17, expected a whole number of 1 to 16. Give such a number, or leave the field out."),
        ({"max_tokens": 1.5}, "max_tokens", "got 1.5, expected a whole number of 1 to 2147483647. Give such a number, or leave the field out."),
        ({"stream": 1}, "stream", "got 1, expected true or false. Give one, or leave the field out."),
        ({"stop": [""]}, "stop", 'got [""], expected a text or a list of at most 16, none of them empty. Give such texts, or leave the field out.'),
        ({"logit_bias": {"a": 1}}, "logit_bias", 'got the key "a", expected a token id of 0 to 256. Ask /tokenize for the ids of a text.'),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias", 'got the key "01", expected a token id of 0 to 256. Ask /tokenize for the ids of a text.'),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "got 101, expected a number of -100.0 to 100.0. Give such a number, or leave the field out."),
        ({"top_logprobs": 2}, "top_logprobs", 'got 2 without logprobs, expected both. Add "logprobs": true.'),
        ({"tools": [{"type": "function"}]}, "tools", 'got [{"type":"function"}], expected []. Leave it out: this server calls no tools.'),
        ({"response_format": {"type": "json_object"}}, "response_format", 'got {"type":"json_object"}, expected {"type":"text"}. Leave it out: this server does not constrain the text.'),
        ({"best_of": 2}, "best_of", "got 2, expected n, 1. Leave it out: this server returns every text that it makes."),
        ({"stream_options": {"include_usage": True}}, "stream_options", 'got {"include_usage":true}, expected an object, and stream true. Leave it out where nothing is streamed.'),
        ({"logprobs": True, "top_logprobs": 20, "n": 4}, "logprobs", "got 4 texts of up to 4096 tokens with 21 odds each, expected at most 262144 odds in an answer that is not streamed. Ask for fewer tokens or odds, or for a stream."),
        ({"temprature": 1}, "temprature", "got a field that this server does not know. Leave it out, or correct its name."),
        ({"messages": []}, "messages", 'got [], expected a list of messages. Give at least one, such as {"role": "user", "content": "Hello"}.'),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "got none, expected one. Say who speaks, such as user."),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got none, expected text. Say something, or leave the message out."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", 'got {"type":"image_url"}, expected text, or a list of parts of type text. Leave out images, sound and files: this server reads text.'),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "got 5017 tokens, expected fewer than the context of 4096. Send a shorter text."),
    ],
)  # fmt: skip
def test_what_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "fake", "messages": MESSAGES}, extra_body=fields)
    body: Any = caught.value.body
    assert (body["message"], body["param"]) == (f"{param}: {message}", param)
    assert body["type"] == "invalid_request_error"


@pytest.mark.parametrize("params", [chat_params, completion_params], ids=["chat", "completions"])
def test_no_field_of_the_client_is_unknown(client: openai.OpenAI, params: Any) -> None:
    """Each is followed, ignored, or refused as what it is."""
    is_chat = params is chat_params
    create: Any = client.chat.completions.create if is_chat else client.completions.create
    good = {"model": "fake"} | ({"messages": MESSAGES} if is_chat else {"prompt": "x"})
    names = params.CompletionCreateParamsBase.__annotations__.keys() - good.keys()
    assert len(names) > 12
    codes = set()
    for name in names:
        try:
            create(**good, max_tokens=1, extra_body={name: "no such value"})
        except openai.BadRequestError as caught:
            body: Any = caught.body
            assert body["param"] == name
            codes.add(body["code"])
    assert codes == {"invalid_value", "unsupported_value"}


def test_another_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_a_role_that_the_template_does_not_take(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "tool", "content": "x", "tool_call_id": "1"}]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].tool_call_id: got a field"):
        client.chat.completions.create(model="fake", messages=messages)
    messages = [{"role": "robot", "content": "x"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=messages)
    body: Any = caught.value.body
    assert body["message"] == (
        "messages: got the role robot, expected system, user or assistant. Give one of these."
    )
    assert body["code"] == "chat_template"


def test_a_model_without_a_chat_template(serve: Callable[..., Server]) -> None:
    server = serve(fake={"why_not": "got a template that calls a function, expected data"})
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES)
    body: Any = caught.value.body
    assert body["message"] == (
        "chat template: got a template that calls a function, expected data. Use /v1/completions."
    )
    assert client.completions.create(model="fake", prompt="x").choices[0].text


def test_a_step_that_fails(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="fake", prompt="FAIL=3", max_tokens=9)
    body: Any = caught.value.body
    assert (body["message"], body["code"]) == (
        "step: it failed, as the prompt asked",
        "generation_failed",
    )
    text = ""
    with pytest.raises(openai.APIError, match="step: it failed, as the prompt asked"):
        for chunk in client.completions.create(
            model="fake", prompt="FAIL=3", max_tokens=9, stream=True
        ):
            text += chunk.choices[0].text
    assert text == expected("FAIL=3", 3)
    assert server.metrics()['anybit_requests_total{endpoint="completions",outcome="failed"}'] == 2


def test_keys(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n\nsecond-key\n")
    server = serve("--api-key", str(tmp_path / "keys"))

    def text(key: str) -> str:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        return client.completions.create(model="fake", prompt="x", max_tokens=1).choices[0].text

    assert text("first-key") == text("second-key") == expected("x", 1)
    for wrong in (
        "first-ke",
        "first-key2",
        "first-keyfirst-key",
        "FIRST-KEY",
        "first-key second-key",
    ):
        with pytest.raises(openai.AuthenticationError) as caught:
            text(wrong)
        body: Any = caught.value.body
        assert body["message"] == (
            "Authorization: got no valid key, expected one that this server knows. Send Authorization: Bearer KEY."
        )
        assert (body["type"], body["code"]) == ("authentication_error", "invalid_api_key")


def test_a_full_queue(serve: Callable[..., Server]) -> None:
    server = serve("--slots", "1", "--queue", "1", fake={"step_us": 2000})
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    running = client.completions.create(model="fake", prompt="a", max_tokens=4000, stream=True)
    next(iter(running))
    waiting = client.completions.create(model="fake", prompt="b", max_tokens=4000, stream=True)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="fake", prompt="c")
    body: Any = caught.value.body
    assert body["message"] == "queue: got 1 that wait, expected fewer. Try again later."
    assert (body["type"], body["code"]) == ("rate_limit_error", "queue_full")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    found = server.metrics()
    assert found["anybit_slots_used"] == 1 and found["anybit_queue_length"] == 1
    with pytest.raises(openai.RateLimitError):  # the first of two fits, and does not stay
        running.close()
        server.until(lambda: server.metrics()["anybit_queue_length"] == 0)
        client.completions.create(model="fake", prompt=["d", "e"])
    waiting.close()
    server.until_idle()
    assert client.completions.create(model="fake", prompt="f", max_tokens=2).choices[
        0
    ].text == expected("f", 2)


def test_more_texts_than_ever_fit(serve: Callable[..., Server]) -> None:
    """Trying again would not help."""
    server = serve("--slots", "2", "--queue", "1")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert len(client.completions.create(model="fake", prompt="x", n=3).choices) == 3
    for more in ({"n": 4}, {"prompt": ["x"] * 4}):
        with pytest.raises(openai.BadRequestError, match=r"got 4.*, expected .*(1 to|at most) 3\."):
            client.completions.create(**{"model": "fake", "prompt": "x", **more})


def test_request_ids(client: openai.OpenAI, server: Server) -> None:
    got = client.completions.create(
        model="fake", prompt="x", extra_headers={"X-Request-Id": "trace-1.2"}
    )
    assert got._request_id == "trace-1.2" and got.id == "cmpl-trace-1.2"
    other = client.completions.create(
        model="fake", prompt="x", extra_headers={"X-Request-Id": "a b"}
    )
    assert other._request_id and len(other._request_id) == 16
    server.until(lambda: server.lines("request")[-1]["id"] == other._request_id)
    first = server.lines("request")[-2]
    assert first["id"] == "trace-1.2"
    assert (first["status"], first["outcome"], first["completion_tokens"]) == (200, "ok", 16)
    assert {"time", "level", "client", "seconds", "queued_s", "first_token_s"} <= first.keys()


def test_many_at_once_do_not_mix(serve: Callable[..., Server]) -> None:
    """64 streams, more than there are slots: each token arrives once, in its place."""
    server = serve("--slots", "16", fake={"step_us": 100})

    async def one(client: openai.AsyncOpenAI, i: int) -> tuple[int, str]:
        text = ""
        stream = await client.completions.create(
            model="fake", prompt=f"prompt {i}", max_tokens=50 + i, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
        return i, text

    async def all_of_them() -> list[tuple[int, str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    for i, text in asyncio.run(all_of_them()):
        assert text == expected(f"prompt {i}", 50 + i)
    found = server.metrics()
    assert found['anybit_requests_total{endpoint="completions",outcome="ok"}'] == 64
    assert found["anybit_time_to_first_token_seconds_count"] == 64
    assert found["anybit_time_between_tokens_seconds_count"] == sum(49 + i for i in range(64))
