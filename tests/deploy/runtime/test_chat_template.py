"""Prompts that C++ puts together from chat.json are the template's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from exporter.chat import chat_data, no_template
from tests.deploy.runtime.token_cases import AnswerError, Answers
from tests.exporter.chat_cases import SAID, conversation, tokenizer

FIX = "Export the model again with this version"
ORDER = "Send other roles, or the same in another order"
OWN_WAY = "the model's chat template treats it in a way of its own, which is not known here"


def load(answers: Answers, template: str | None) -> Any:
    made = tokenizer(template)
    answers.ask(chat=json.dumps(chat_data(made)))
    return made


def refusal(answers: Answers, *messages: tuple[str, str], generation: bool = True) -> Any:
    asked = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(AnswerError) as error:
        answers.ask(render=asked, generation=generation)
    return error.value.args


@pytest.mark.parametrize("name", SAID)
def test_any_conversation_is_the_templates_or_refused(name: str, answers: Answers) -> None:
    made = load(answers, SAID[name])
    choose = random.Random(5)
    same = 0
    for _ in range(150):
        messages, generate = conversation(choose), choose.random() < 0.5
        try:
            said = answers.ask(render=messages, generation=generate)
        except AnswerError:
            continue
        assert said == made.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        same += 1
    assert same > 20


def test_a_prompt_says_which_parts_are_contents(answers: Answers) -> None:
    talk = [("user", "Hi \u6f22"), ("assistant", "Hello."), ("user", "What is 1 < 2?")]
    messages = [{"role": role, "content": text} for role, text in talk]
    for template in SAID.values():
        load(answers, template)
        text, contents = answers.ask(prompt=messages)
        assert text == answers.ask(render=messages)
        raw = text.encode()
        assert [raw[begin:end].decode() for begin, end in contents] == [text for _, text in talk]


def test_ordinary_conversations_are_not_refused(answers: Answers) -> None:
    talk = [("user", "Hi"), ("assistant", "Hello."), ("user", "What is 1 < 2?")]
    for name, template in SAID.items():
        load(answers, template)
        for start in ([], [("system", "Be brief.")]):
            if start and name == "gemma":
                continue
            messages = [{"role": role, "content": text} for role, text in [*start, *talk]]
            assert "What is 1 < 2?" in answers.ask(render=messages)


@pytest.mark.parametrize("name", ["qwen3", "thinker"])
def test_thoughts_of_earlier_answers(name: str, answers: Answers) -> None:
    """Are dropped as the template does, whatever stands around the tags; users may write of them."""
    made = load(answers, SAID[name])
    thoughts = "<think>\nx\n</think>\n\n\u6f22", "a</think>b</think>\n c\n", "</think>", "no tags"
    for thought in thoughts:
        talk = [("user", "What is </think>?"), ("assistant", thought), ("user", "z</think>\n")]
        messages = [{"role": role, "content": text} for role, text in talk]
        text, contents = answers.ask(prompt=messages)
        assert text == made.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        said = [text.encode()[begin:end].decode() for begin, end in contents]
        left = thought.rpartition("</think>")[2].lstrip("\n")
        assert said == list(filter(None, (talk[0][1], left, talk[2][1])))


def test_refusals_say_why(answers: Answers) -> None:
    load(answers, SAID["gemma"])
    assert refusal(answers, ("system", "x"), ("user", "y")) == (
        "messages[0], role",
        "got system at the beginning, expected messages that the model's chat template takes "
        "(it says: There is no system role.)",
        ORDER,
    )
    assert refusal(answers, ("user", "x"), ("tool", "y")) == (
        "messages[1], role",
        "got tool after user, expected messages that the model's chat template takes",
        ORDER,
    )
    assert refusal(answers) == (
        "messages",
        "got none, expected one or more",
        "Send a message of the user",
    )
    load(answers, SAID["qwen3"])
    assert refusal(answers, ("user", "x"), ("assistant", "<think>\n</think>y")) == (
        "messages[1], content",
        f"got a text with </think>, expected one without: {OWN_WAY}",
        "Take it out of the message",
    )
    load(answers, SAID["llama2"])
    assert refusal(answers, ("user", " \n")) == (
        "messages[0], content",
        f"got no text, expected some: {OWN_WAY}",
        "Leave the message out",
    )
    assert refusal(answers, ("system", "alone")) == (
        "messages",
        "got system as the last role, expected another",
        "End with a message of the user",
    )
    load(answers, SAID["mistral"])
    assert refusal(answers, ("user", "x"), ("system", "y"), ("user", "z")) == (
        "messages[1], role",
        "got system, expected it at the beginning alone",
        ORDER,
    )
    assert refusal(answers, ("system", "x"), ("user", "y"), ("assistant", "z")) == (
        "messages",
        "got assistant as the last role, expected another",
        "End with a message of the user",
    )


def test_a_template_that_cannot_be_said_says_why(answers: Answers) -> None:
    why = "got one thing, expected another"
    assert answers.ask(chat=json.dumps(no_template(why))) == why
    assert refusal(answers, ("user", "x")) == (
        "chat.json",
        why,
        "Put the prompt together yourself, and send it as text",
    )


@pytest.mark.parametrize(
    ("change", "where", "problem"),
    [
        ({"format": 2}, ", format", "got 2, expected 1"),
        ({"turns": None}, ", turns", "got null, expected an object"),
        ({"end": {"user": 3}}, ", end, user", "got 3, expected a list"),
        ({"thoughts": {"end": 3, "left": ""}}, ", thoughts, end", "got 3, expected a string"),
        (
            {"end": {"user": ["a", "%n", "b"]}},
            ", end, user[1]",
            'got "%n", expected a format of dates',
        ),
        (
            {"end": {"user": ["a", "%d"]}},
            ", end, user",
            "got array, expected a text, or texts and formats of dates in turn",
        ),
    ],
)
def test_a_damaged_file_is_an_error(
    change: dict[str, Any], where: str, problem: str, answers: Answers
) -> None:
    with pytest.raises(AnswerError) as error:
        answers.ask(chat=json.dumps(chat_data(tokenizer(SAID["chatml"])) | change))
    assert error.value.args == (f"chat.json{where}", problem, FIX)


def test_the_export_writes_it(artifact: Path) -> None:
    """A model without a template has a file that says so, with a record like every other."""
    onnx = artifact / "onnx"
    assert json.loads((onnx / "chat.json").read_text()) == no_template()
    record = json.loads((onnx / "model.json").read_text())["files"]["chat.json"]
    assert record["bytes"] == (onnx / "chat.json").stat().st_size
