"""Damaged and hostile variants of a file, drawn by hypothesis, and what may come of them."""

from __future__ import annotations

import copy
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from plugins.errors import UserError

__all__ = ["Folder", "bounded_memory", "changed_bytes", "changed_json", "fuzzed", "outcome"]

T = TypeVar("T")

# The same examples in every run: a failure is found again, and a green run stays green. ANYBIT_FUZZ
# asks for more of them.
fuzzed = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=int(os.environ.get("ANYBIT_FUZZ", "100")),
)

VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    1 << 31,
    1 << 40,
    1 << 63,
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e308,
    "",
    "1",
    "x" * 5000,
    "\x1b[31m\u202e[/bold]",
    "../../../etc/passwd",
    [],
    {},
    [1],
    ["a", None],
    [[[[]]]],
    {"a": {"b": []}},
]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside this one."""
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = list(enumerate(value))[:8]
    for key, inner in pairs:
        yield (*at, key)
        yield from _places(inner, (*at, key))


@st.composite
def changed_json(draw: st.DrawFn, value: dict[str, Any]) -> bytes:
    """JSON text of an object of which one or two values are others, are gone, or have another name;
    now and then a few bytes are changed too.
    """
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        if not (places := list(_places(value))):
            break
        *path, key = draw(st.sampled_from(places))
        owner = value
        for step in path:
            owner = owner[step]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "nest"])):
            case "replace":
                owner[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "remove":
                del owner[key]
            case "rename" if isinstance(owner, dict):
                owner[f"{key}_"] = owner.pop(key)
            case _:
                owner[key] = [owner[key]]
    text = json.dumps(value).encode()
    return draw(st.one_of(st.just(text), st.just(text), st.just(text), changed_bytes(text)))


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes, within: int | None = None) -> bytes:
    """Bytes that are overwritten in one to four places, or cut, or have some inserted.

    Args:
        within: only the first so many bytes change; the rest stays.
    """
    head, rest = bytearray(data[:within]), data[len(data[:within]) :]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(head) - 1, 0)))
        piece = draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f" + b"\0" * 4]),
            )
        )
        match draw(st.sampled_from(["write", "write", "write", "insert", "cut"])):
            case "write":
                head[at : at + len(piece)] = piece
            case "insert":
                head[at:at] = piece
            case _:
                del head[at : at + draw(st.integers(1, 64))]
    return bytes(head) + rest


def outcome(call: Callable[[], T]) -> T | UserError:
    """What a call gives, or the error that it tells the user; any other passes through."""
    try:
        return call()
    except UserError as error:
        text = str(error)
        assert len(text) < 3000, text
        assert error.exit_code in (2, 3)
        return error


class Folder:
    """A folder whose files are overwritten for a while."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = {
            str(file.relative_to(path)): file.read_bytes()
            for file in path.rglob("*")
            if file.is_file()
        }

    def __repr__(self) -> str:  # hypothesis shows arguments
        return f"Folder({self.path})"

    def bytes(self, name: str) -> bytes:
        """A file as it was."""
        return self._whole[name]

    def json(self, name: str) -> Any:
        """The same, parsed."""
        return json.loads(self._whole[name])

    @contextmanager
    def holding(self, **files: bytes) -> Iterator[None]:
        """Inside, these files have other contents; behind it the folder is as it was."""
        try:
            for name, data in files.items():
                (self.path / name).write_bytes(data)
            yield
        finally:
            for name, data in self._whole.items():
                if name in files:
                    (self.path / name).write_bytes(data)


@contextmanager
def bounded_memory(gigabytes: float = 2.0) -> Iterator[None]:
    """Inside, the process may take so much more memory than it has; more is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(gigabytes * 1e9), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
