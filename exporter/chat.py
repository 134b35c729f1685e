"""Turns a model's chat template into data, so that a program without a template engine can put
prompts together: OUT/onnx/chat.json.

The template (Jinja) is rendered on probe conversations whose messages are marks. What stands before
a mark depends, in nearly all templates, on the role of the message and of the one before it alone;
that is what the file holds, after it has been held against the template on random conversations.
Where a template does more, the file says why it holds nothing.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from calibration.checkpoints.foreign import quiet_transformers, reason
from plugins.text import printable, shown

__all__ = ["FORMAT", "chat_data", "no_template"]

FORMAT = 1

_ROLES = ("system", "user", "assistant")
_LONGEST = 4  # messages of a probe conversation
_CHECKS = 50  # random conversations
_SPACES = tuple(one for one in map(chr, range(0x110000)) if one.isspace())
# The template's strftime_now() gives these around its format, so that dates are seen.
_DATE, _DATE_END = "\ue0f0", "\ue0f1"
# Jinja takes one line end after a block away.
_SHOW_DATES = (
    f"{{%- macro strftime_now(format) -%}}{_DATE}{{{{ format }}}}{_DATE_END}{{%- endmacro %}}\n"
)
_FORMATS = re.compile(r"(?:[^%]|%[aAbBdHIjmMpSyY%])*")  # what C's strftime does alike everywhere

Roles = tuple[str, ...]


class _UnsaidError(Exception):
    """Why a template cannot be said as data."""


class _RefusedError(Exception):
    """Why the template raised."""


@dataclass(frozen=True)
class _Turn:
    """What the template does about a message.

    Attributes:
        before: the text before its content.
        left, right: characters that are taken off the content's ends.
    """

    before: str
    left: str = ""
    right: str = ""


@dataclass(frozen=True)
class _Thoughts:
    """What the template drops of the assistant's messages that a later one of the user follows: all
    up to the last `end`, and the characters `left` behind it.
    """

    end: str
    left: str

    def dropped(self, content: str) -> str:
        """The content of such a message without them."""
        _, found, rest = content.rpartition(self.end)
        return rest.lstrip(self.left or "\0") if found else content


@dataclass(kw_only=True)
class _Learned:
    """A template as data.

    Attributes:
        turns: by role before ("" at the beginning), role, and whether the message is the last.
        ends: what follows the last message, by its role and whether an answer is asked for.
        refused: why, by role before and role.
        moved: the system's message stands before the last message, which is the user's.
        unlike: contents with these words are treated in ways of their own.
        thoughts: what is known of the way of one of these words; nothing is for the assistant's
            messages behind the user's last.
        empty: whether an empty content is treated like others.
    """

    turns: dict[tuple[str, str, bool], _Turn] = field(default_factory=dict)
    ends: dict[tuple[str, bool], str] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    moved: bool = False
    unlike: list[str] = field(default_factory=list)
    thoughts: _Thoughts | None = None
    empty: bool = True

    def order(self, roles: Sequence[str]) -> list[int]:
        """Messages in the order in which they stand in the prompt."""
        places = list(range(len(roles)))
        if self.moved and roles[0] == "system":
            places.insert(len(places) - 2, places.pop(0))
        return places

    def keys(self, roles: Sequence[str]) -> list[tuple[str, str, bool]]:
        """The turns of a conversation, in the order of the prompt."""
        placed = ["", *(roles[place] for place in self.order(roles))]
        return [
            (before, role, at == len(roles) - 1)
            for at, (before, role) in enumerate(itertools.pairwise(placed))
        ]

    def takes(self, roles: Sequence[str], generate: bool) -> bool:
        """Whether the data has a prompt for messages of these roles."""
        if self.moved and "system" in roles and ("system" in roles[1:] or roles[-1] != "user"):
            return False
        keys = self.keys(roles)
        return all(key in self.turns for key in keys) and (keys[-1][1], generate) in self.ends

    def contents(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """What is left of the messages."""
        contents = [one["content"] for one in messages]
        if self.thoughts:
            for place in _answered(messages):
                contents[place] = self.thoughts.dropped(contents[place])
        return contents

    def knows(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Whether no content is treated in a way of its own that is not known."""
        answered = _answered(messages)
        for place, content in enumerate(self.contents(messages)):
            role, whole = messages[place]["role"], messages[place]["content"]
            known = self.thoughts and (role != "assistant" or place in answered)
            if not self.empty and not content.strip():
                return False
            for word in self.unlike:
                if word in whole and not (known and self.thoughts and word == self.thoughts.end):
                    return False
        return True

    def render(self, messages: Sequence[Mapping[str, str]], generate: bool) -> str:
        """The prompt, as C++ puts it together."""
        roles = [one["role"] for one in messages]
        parts, keys, contents = [], self.keys(roles), self.contents(messages)
        for place, key in zip(self.order(roles), keys, strict=True):
            turn = self.turns[key]
            content = contents[place].lstrip(turn.left or "\0")
            parts += [turn.before, content.rstrip(turn.right or "\0")]
        return "".join(parts) + self.ends[keys[-1][1], generate]

    def as_json(self) -> dict[str, Any]:
        """What chat.json holds; docs/onnx.md lists the fields."""
        turns = {}
        for (before, role, last), turn in self.turns.items():
            if last and turn == self.turns[before, role, False]:
                continue
            name = f"{before}>{role}" + ("." if last else "")
            turns[name] = {"before": _dated(turn.before), "left": turn.left, "right": turn.right}
        return {
            "format": FORMAT,
            "why_not": None,
            "turns": turns,
            "end": {role: _dated(end) for (role, asked), end in self.ends.items() if not asked},
            "generate": {role: _dated(end) for (role, asked), end in self.ends.items() if asked},
            "refused": {f"{before}>{role}": why for (before, role), why in self.refused.items()},
            "unlike": self.unlike,
            "thoughts": self.thoughts and vars(self.thoughts),
            "empty": self.empty,
            "system_before_last": self.moved,
        }


def no_template(
    why: str = "got a model without a chat template, expected one with",
) -> dict[str, Any]:
    """What chat.json holds where nothing is rendered; `why` is an error's "got X, expected Y"."""
    return {"format": FORMAT, "why_not": why}


def chat_data(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's chat template as data.

    Args:
        tokenizer: of transformers, which renders in its sandbox.

    Returns:
        What chat.json holds: the text around each message, or why there is none.
    """
    if not tokenizer.chat_template:
        return no_template()
    try:
        with quiet_transformers():
            return _learn(_Template(tokenizer)).as_json()
    except _UnsaidError as error:
        return no_template(
            f"got a chat template that is more than text around each message ({error}), expected no "
            "more"
        )


class _Template:
    """A template, and what it gave already."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            self.text = tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them the default
            raise _UnsaidError(reason(error)) from None
        self.show = _SHOW_DATES if "strftime_now" in self.text else ""
        self.known: dict[tuple[Roles, bool], str | _RefusedError] = {}

    def render(self, messages: Sequence[Mapping[str, str]], generate: bool) -> str:
        """The prompt, with marks around the formats of dates.

        Raises:
            _RefusedError: the template raised.
        """
        try:
            made = self.tokenizer.apply_chat_template(
                [dict(one) for one in messages],
                chat_template=self.show + self.text,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as error:  # a template may raise anything
            raise _RefusedError(printable(shown(reason(error)))) from None
        if not isinstance(made, str):
            raise _RefusedError(f"it gives {type(made).__name__}")
        return made

    def marked(self, roles: Roles, generate: bool) -> str:
        """The prompt of messages that are marks."""
        key = roles, generate
        if key not in self.known:
            try:
                self.known[key] = self.render(_messages(roles), generate)
            except _RefusedError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, _RefusedError):
            raise found
        return found

    def words(self) -> list[str]:
        """The strings in the template's code: what it may look for in a content."""
        import jinja2

        found: dict[str, None] = {}
        with suppress(jinja2.TemplateError):
            for _, kind, value in jinja2.Environment().lex(self.text):
                if kind == "string":
                    with suppress(ValueError, SyntaxError):
                        found[ast.literal_eval(value.replace("\n", "\\n"))] = None
        return [word for word in found if word.strip()]


def _answered(messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Places of the assistant's messages that a later one of the user follows."""
    roles = [one["role"] for one in messages]
    last = max((at for at, role in enumerate(roles) if role == "user"), default=0)
    return [at for at, role in enumerate(roles[:last]) if role == "assistant"]


def _mark(at: int) -> str:
    return f"Qz{at}zQ"


def _messages(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": _mark(at)} for at, role in enumerate(roles)]


def _dated(text: str) -> str | list[str]:
    """The text; with dates in it a list of texts and, between them, formats."""
    parts = re.split(f"[{_DATE}{_DATE_END}]", text)
    for format_ in parts[1::2]:
        if not _FORMATS.fullmatch(format_):
            raise _UnsaidError(f"it has a date as {shown(printable(format_))}")
    return parts if len(parts) > 1 else text


def _learn(template: _Template) -> _Learned:
    """The most of a template that can be said: messages in any order, else the system's only at the
    beginning, else a strict alternation.
    """
    every = [
        roles
        for length in range(1, _LONGEST + 1)
        for roles in itertools.product(_ROLES, repeat=length)
    ]
    first = [roles for roles in every if "system" not in roles[1:]]
    strict = [roles for roles in first if _alternates(roles)]
    why = ""
    for choice in (every, first, strict):
        for moved in (False, True):
            try:
                learned = _fit(template, choice, moved)
                _learn_strips(template, learned, choice)
                _learn_exceptions(template, learned, choice)
                _check(template, learned)
                _learn_thoughts(template, learned)
                return learned
            except _UnsaidError as error:
                # Of the least that was tried; in its place, which is how most templates are.
                if not moved:
                    why = str(error)
    raise _UnsaidError(why)


def _alternates(roles: Roles) -> bool:
    turns = roles[1:] if roles[0] == "system" else roles
    return all(role == ("user", "assistant")[at % 2] for at, role in enumerate(turns))


def _fit(template: _Template, choice: Iterable[Roles], moved: bool) -> _Learned:
    """The texts between the marks of these conversations.

    Raises:
        _UnsaidError: they depend on more than two roles.
    """
    learned = _Learned(moved=moved)
    fails: dict[tuple[Roles, bool], Exception] = {}
    for roles, generate in itertools.product(choice, (False, True)):
        if moved and roles[0] == "system" and (roles[-1] != "user" or len(roles) < 2):
            continue
        try:
            parts = _between(template.marked(roles, generate), learned.order(roles))
        except (_RefusedError, _UnsaidError) as error:
            fails[roles, generate] = error
            continue
        keys = learned.keys(roles)
        for key, text in zip(keys, parts, strict=False):
            _agree(learned.turns.setdefault(key, _Turn(text)).before, text, roles, key)
        end = keys[-1][1], generate
        _agree(learned.ends.setdefault(end, parts[-1]), parts[-1], roles, end)
    if not learned.turns:
        raise _UnsaidError(next(map(str, fails.values()), "it renders nothing"))
    # A template looks ahead at most whether a message is the last.
    for before, role, last in list(learned.turns):
        learned.turns.setdefault((before, role, not last), learned.turns[before, role, last])
    for (roles, generate), why in fails.items():
        if learned.takes(roles, generate):
            raise _UnsaidError(f"{_named(roles)}: {why}")
        before, role, _ = learned.keys(roles)[-1]
        if (before, role, True) not in learned.turns:
            learned.refused.setdefault((before, role), str(why))
    return learned


def _between(text: str, order: Sequence[int]) -> list[str]:
    """What stands before each mark, and after the last."""
    parts = []
    for place in order:
        before, found, text = text.partition(_mark(place))
        if not found:
            raise _UnsaidError("a message is left out, changed or in another place")
        parts.append(before)
    if any(re.search(r"Qz\dzQ", part) for part in (*parts, text)):
        raise _UnsaidError("a message stands twice")
    return [*parts, text]


def _agree(known: str, text: str, roles: Roles, key: object) -> None:
    if known != text:
        raise _UnsaidError(
            f"{_named(roles)}: got {shown(ascii(text), 60)} where other conversations have "
            f"{shown(ascii(known), 60)}"
        )


def _named(roles: Iterable[str]) -> str:
    return "messages of " + ", ".join(roles)


def _samples(
    learned: _Learned, choice: Iterable[Roles]
) -> Iterator[tuple[Roles, int, tuple[str, str, bool]]]:
    """For each turn a conversation that has it, and the message's place."""
    seen = set()
    for roles in choice:
        if not learned.takes(roles, True):
            continue
        for place, key in zip(learned.order(roles), learned.keys(roles), strict=True):
            if key not in seen:
                seen.add(key)
                yield roles, place, key


def _learn_strips(template: _Template, learned: _Learned, choice: Iterable[Roles]) -> None:
    """Which characters the template takes off the ends of contents."""
    samples = list(_samples(learned, choice))
    for roles, place, key in samples:
        ends = ["", ""]
        for space in _SPACES:
            messages = _messages(roles)
            content = messages[place]["content"]
            messages[place]["content"] = space + content + space
            text = _rendered(template, messages)
            for left, right in itertools.product((space, ""), repeat=2):
                messages[place]["content"] = left + content + right
                if learned.render(messages, True) == text:
                    ends[0] += "" if left else space
                    ends[1] += "" if right else space
                    break
            else:
                raise _UnsaidError(f"{_named(roles)}: it changes the space around a content")
        learned.turns[key] = _Turn(learned.turns[key].before, *ends)
    for before, role, last in set(learned.turns) - {key for *_, key in samples}:
        learned.turns[before, role, last] = learned.turns[before, role, not last]


def _rendered(template: _Template, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        return template.render(messages, True)
    except _RefusedError as error:
        raise _UnsaidError(f"{_named(one['role'] for one in messages)}: {error}") from None


def _learn_exceptions(template: _Template, learned: _Learned, choice: Iterable[Roles]) -> None:
    """Contents that the template treats in ways of its own: empty ones, and such as have one of the
    words in its code.
    """
    samples = {roles: None for roles, *_ in _samples(learned, choice)}

    def alike(content: str) -> bool:
        for roles in samples:
            messages = [{"role": role, "content": content} for role in roles]
            try:
                if template.render(messages, True) != learned.render(messages, True):
                    return False
            except _RefusedError:
                return False
        return True

    learned.empty = alike("")
    for word in sorted(template.words(), key=len):
        tries = f"{word}x{word}", f"a{word}b", f"a {word} b{word}c"
        if not any(known in word for known in learned.unlike) and not all(map(alike, tries)):
            learned.unlike.append(word)


def _learn_thoughts(template: _Template, learned: _Learned) -> None:
    """Whether what the template does about a word is to drop what an answer begins with."""
    for end, left in itertools.product(learned.unlike, ("", "\n", "".join(_SPACES))):
        learned.thoughts = _Thoughts(end, left)
        with suppress(_UnsaidError):
            return _check(template, learned, end)
    learned.thoughts = None


def _check(template: _Template, learned: _Learned, word: str = "") -> None:
    """Hold the data against the template on random conversations.

    Args:
        word: stands in some of their messages, and in one of the assistant at least.

    Raises:
        _UnsaidError: they differ.
    """
    choose = random.Random(0)
    done = tries = 0
    while done < _CHECKS:
        tries += 1
        if tries > 200 * _CHECKS:
            raise _UnsaidError("it takes too few conversations to check it")
        roles = _random_roles(learned, choose)
        generate = choose.random() < 0.5
        messages = [{"role": role, "content": _random_content(choose)} for role in roles]
        if not learned.takes(roles, generate):
            continue
        if word:
            for one in messages:
                for _ in range(choose.randrange(3)):
                    one["content"] += word + _random_content(choose)
            if not any(word in messages[place]["content"] for place in _answered(messages)):
                continue
        if not learned.knows(messages):
            continue
        done += 1
        try:
            text = template.render(messages, generate)
        except _RefusedError as error:
            raise _UnsaidError(f"{_named(roles)}: {error}") from None
        if text != (said := learned.render(messages, generate)):
            at = next(
                (at for at, pair in enumerate(zip(text, said, strict=False)) if len(set(pair)) > 1),
                min(len(text), len(said)),
            )
            raise _UnsaidError(
                f"{_named(roles)}: got {text[at : at + 30]!a} where text around each message "
                f"gives {said[at : at + 30]!a}"
            )


def _random_roles(learned: _Learned, choose: random.Random) -> Roles:
    """Of a conversation of up to nine messages that the data may have a prompt for."""
    roles = ["system"] if choose.random() < 0.5 else []
    for _ in range(choose.randrange(1, 9)):
        before = roles[-1] if roles else ""
        if learned.moved and before == "system":
            before = ""  # it stands elsewhere
        after = [role for one, role, last in learned.turns if one == before and not last]
        roles.append(choose.choice([*after, "user"]))
    return tuple(roles)


def _random_content(choose: random.Random) -> str:
    letters = string.ascii_letters + string.digits + string.punctuation + "éßЖ漢🙂"
    words = [
        "".join(choose.choices(letters, k=choose.randrange(1, 9)))
        for _ in range(choose.randrange(0, 6))
    ]
    spaces = "", "", " ", "\n", "\n\n", "\t", "  \n ", "\r\n", "\u00a0"
    before, after = choose.choices(spaces, k=2)
    return before + "".join(word + (choose.choice(spaces) or " ") for word in words) + after
