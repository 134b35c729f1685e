"""Chat templates as data: what is found in them, and why some cannot be said."""

from __future__ import annotations

import random

import pytest

from exporter.chat import _SPACES, chat_data, no_template
from tests.exporter.chat_cases import SAID, tokenizer

SPACE = "".join(_SPACES)


def test_turns_of_a_family_that_folds_the_system_in() -> None:
    found = chat_data(tokenizer(SAID["llama2"]))
    refused = "Users and assistants take turns, users first."
    assert found["turns"] == {
        ">system": {"before": "<s>[INST] <<SYS>>\n", "left": "", "right": ""},
        ">user": {"before": "<s>[INST] ", "left": SPACE, "right": SPACE},
        "system>user": {"before": "\n<</SYS>>\n\n", "left": "", "right": SPACE},
        "user>assistant": {"before": " [/INST] ", "left": SPACE, "right": SPACE},
        "assistant>user": {"before": " </s><s>[INST] ", "left": SPACE, "right": SPACE},
    }
    assert found["end"] == found["generate"] == {"user": " [/INST]", "assistant": " </s>"}
    assert found["refused"][">assistant"] == found["refused"]["user>user"] == refused
    assert found["empty"] is False and found["system_before_last"] is False


def test_a_default_system_message_and_the_prompt_of_an_answer() -> None:
    found = chat_data(tokenizer(SAID["chatml_default"]))
    assert found["turns"][">user"]["before"] == (
        "<|im_start|>system\nBe of use.<|im_end|>\n<|im_start|>user\n"
    )
    assert found["turns"][">system"]["before"] == "<|im_start|>system\n"
    assert found["end"]["user"] == "<|im_end|>\n"
    assert found["generate"]["user"] == "<|im_end|>\n<|im_start|>assistant\n"


def test_dates_stay_dates() -> None:
    found = chat_data(tokenizer(SAID["llama3_dated"]))
    before = "<s><|start_header_id|>system<|end_header_id|>\n\nToday: "
    assert found["turns"][">system"]["before"] == [before, "%d %b %Y", "\n\n"]


def test_the_last_message_may_differ() -> None:
    found = chat_data(tokenizer(SAID["qwen3"]))
    thought = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert found["turns"]["user>assistant."] == {"before": thought, "left": "\n", "right": ""}
    assert found["turns"]["user>assistant"]["before"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert found["unlike"] == ["</think>"]
    assert chat_data(tokenizer(SAID["mistral"]))["system_before_last"] is True


def test_thoughts_that_are_dropped() -> None:
    for name in ("qwen3", "thinker"):
        found = chat_data(tokenizer(SAID[name]))
        assert found["thoughts"] == {"end": "</think>", "left": "\n"}
        assert found["unlike"] == ["</think>"]
    assert chat_data(tokenizer(SAID["chatml"]))["thoughts"] is None


@pytest.mark.parametrize(
    ("change", "thoughts"),
    [
        ("m.content.split('</think>')[-1]", {"end": "</think>", "left": ""}),
        ("m.content.split('</think>')[-1] | trim", None),  # whose end it takes off too
        ("m.content.split('</think>')[0]", None),
        ("m.content | replace('</think>', '')", None),
    ],
)
def test_what_is_done_about_thoughts_is_learned(change: str, thoughts: object) -> None:
    dropping = (
        "{%% set text = %s if m.role == 'assistant' and '</think>' in m.content else m.content %%}"
    )
    found = chat_data(tokenizer(EACH % (dropping % change + "[{{ m.role }}]{{ text }}")))
    assert (found["why_not"], found["unlike"]) == (None, ["</think>"])
    assert found["thoughts"] == thoughts


EACH = "{%% for m in messages %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            EACH % "{{ loop.index ~ ': ' ~ m.content ~ '\n' }}",
            "messages of system, user, assistant: got '\\n3: ' where other conversations have '\\n2: '",
        ),
        (EACH % "{{ m.content | upper }}", "a message is left out, changed or in another place"),
        (EACH % "{{ m.content ~ m.content }}", "a message stands twice"),
        ("{{ messages[0].tools.first }}", "'dict object' has no attribute 'tools'"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        (
            "{{ strftime_now('%X') }}" + EACH % "{{ m.content }}",
            "it has a date as %X",
        ),
        (EACH % "{{ m.content[:40] }}", "messages of user, assistant"),
    ],
)
def test_what_cannot_be_said(template: str, why: str) -> None:
    found = chat_data(tokenizer(template))
    start, end = (
        "got a chat template that is more than text around each message (",
        "), expected no more",
    )
    assert found.keys() == {"format", "why_not"}
    assert found["why_not"].startswith(start + why) and found["why_not"].endswith(end)


def test_no_template_and_no_default_one() -> None:
    assert chat_data(tokenizer(None)) == no_template()
    several = chat_data(tokenizer({"a": "{{ 1 }}", "b": "{{ 2 }}"}))  # type: ignore[arg-type]
    assert several["why_not"].startswith("got a chat template that is more than text")


def test_conversations_of_the_tests_are_of_many_kinds() -> None:
    from tests.exporter.chat_cases import conversation

    choose = random.Random(0)
    orders = {tuple(one["role"] for one in conversation(choose)) for _ in range(100)}
    assert len(orders) > 20
