"""Every display takes the same calls; the JSON one is one object per line."""

from __future__ import annotations

import io
import json

import pytest

from calibration.progress import JsonProgress, PlainProgress, duration, make_progress


def test_json_lines() -> None:
    stream = io.StringIO()
    progress = JsonProgress(stream)
    progress.start("onnx", 2)
    progress.advance(note="layer 0")
    progress.advance()
    progress.message("hello")
    progress.finish()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == [
        "start",
        "progress",
        "progress",
        "message",
        "finish",
    ]
    assert [line["done"] for line in lines] == [0, 1, 2, 2, 2]
    assert all(
        line["stage"] == "onnx" and line["total"] == 2 and line["seconds"] >= 0 for line in lines
    )
    assert lines[1]["note"] == "layer 0" and lines[3]["text"] == "hello"


def test_plain_lines() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.start("quant", 3)
    progress.advance()
    progress.finish()
    assert stream.getvalue().startswith("quant: 0.") and stream.getvalue().endswith(" s\n")


@pytest.mark.parametrize("kind", ["auto", "rich", "plain", "json", "none"])
def test_every_display_takes_the_same_calls(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress(kind)
    progress.start("engine", 3)
    progress.skip(2)
    progress.advance(note="[brackets] are text")
    progress.message("[brackets] are text")
    progress.warning("less than was asked for")
    progress.finish()
    progress.close()
    captured = capsys.readouterr()
    assert ("[brackets] are text" in captured.out + captured.err) == (kind != "none")
    assert "less than was asked for\n" in captured.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.12, "4.1 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1.0 min"),
        (84, "1.4 min"),
        (1320, "22 min"),
        (3569, "59 min"),
        (12600, "3.5 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("calibration.progress.time.monotonic", lambda: clock)
    plain, lines = io.StringIO(), io.StringIO()
    displays = PlainProgress(plain), JsonProgress(lines)
    for display in displays:
        display.start("report", 10)
    for clock in (12.0, 24.0, 36.0, 48.0, 70.0):  # noqa: B007  (the lambda reads it)
        for display in displays:
            display.advance()
    assert plain.getvalue() == (
        "report: 3 of 10, about 1.4 min left\nreport: 5 of 10, about 1.2 min left\n"
    )
    left = [json.loads(line).get("left") for line in lines.getvalue().splitlines()]
    assert left == [None, 108, 96, 84, 72, 70]


def test_steps_that_are_skipped_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("calibration.progress.time.monotonic", lambda: clock)
    lines = io.StringIO()
    progress = JsonProgress(lines)
    progress.start("report", 10)
    progress.skip(8)
    clock = 30.0
    progress.advance()
    last = json.loads(lines.getvalue().splitlines()[-1])
    assert (last["done"], last["total"], last["left"]) == (1, 2, 30)
