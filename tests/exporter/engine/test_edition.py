"""Choosing a TensorRT edition, and refusing engines that another one built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.out.files import write_json
from exporter.engine import edition
from exporter.engine.edition import Edition, check_engine, select_edition
from plugins.errors import InputError
from tests.exporter.engine_cases import ENGINE

Install = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Install:
    """set(gpus, tensorrt="10.15", tensorrt_rtx=None): pretend that these GPUs and versions are
    here.
    """

    def pretend(
        gpus: list[str], tensorrt: str | None = None, tensorrt_rtx: str | None = None
    ) -> None:
        versions = {"tensorrt": tensorrt, "tensorrt-rtx": tensorrt_rtx}
        monkeypatch.setattr(edition, "gpu_capabilities", lambda: gpus)
        monkeypatch.setattr(
            edition,
            "_installed",
            lambda name: Edition(name, str(versions[name])) if versions[name] else None,
        )

    return pretend


@pytest.mark.parametrize(
    ("choice", "gpus", "versions", "expected"),
    [
        ("auto", ["9.0"], ("10.15", "1.7"), "tensorrt 10.15"),
        ("auto", ["9.0"], (None, "1.7"), "tensorrt-rtx 1.7"),
        ("auto", [], ("10.15", "1.7"), "tensorrt-rtx 1.7"),
        ("tensorrt", ["9.0"], ("11.0", "1.7"), "tensorrt 11.0"),
        ("tensorrt-rtx", ["9.0"], ("11.0", "1.7"), "tensorrt-rtx 1.7"),
    ],
)
def test_choice(
    machine: Install,
    choice: str,
    gpus: list[str],
    versions: tuple[str | None, str | None],
    expected: str,
) -> None:
    machine(gpus, *versions)
    assert str(select_edition(choice)) == expected


@pytest.mark.parametrize(
    ("choice", "gpus", "text"),
    [
        (
            "auto",
            [],
            "--engine auto: got no module tensorrt_rtx, expected it installed. pip install "
            "tensorrt-rtx-cu13==1.7.1.116; "
            "or use --engine none.",
        ),
        (
            "auto",
            ["9.0"],
            "--engine auto: got no module tensorrt or tensorrt_rtx, expected it installed. "
            "pip install tensorrt (needs NVIDIA's package index and a GPU); "
            "or pip install tensorrt-rtx-cu13==1.7.1.116; or use --engine none.",
        ),
        (
            "tensorrt",
            [],
            "--engine tensorrt: got no CUDA device, expected one: this edition builds for the "
            "GPU it runs on. "
            "Use --engine tensorrt-rtx, which needs no GPU to build, or run on a machine with a GPU.",
        ),
    ],
)
def test_nothing_to_choose(machine: Install, choice: str, gpus: list[str], text: str) -> None:
    machine(gpus)
    with pytest.raises(InputError) as caught:
        select_edition(choice)
    assert str(caught.value) == text


FIX = "Build the engine again on this machine (python -m exporter ... --resume)."


@pytest.mark.parametrize(
    ("record", "gpus", "text"),
    [
        (
            {"edition": "tensorrt-rtx", "version": "1.6.0"},
            [],
            f"got an engine of tensorrt-rtx 1.6.0, expected one of the installed tensorrt-rtx "
            f"1.7.1.116. {FIX}",
        ),
        (
            {"edition": "tensorrt", "version": "11.0"},
            [],
            "got an engine of tensorrt 11.0, expected that edition to be installed. "
            "pip install tensorrt (needs NVIDIA's package index and a GPU).",
        ),
        (
            {"compute_capabilities": ["8.0"]},
            ["9.0"],
            f"got an engine for compute capability 8.0, expected 9.0. {FIX}",
        ),
    ],
)
def test_engine_of_another_build_is_refused(
    machine: Install, tmp_path: Path, record: dict[str, Any], gpus: list[str], text: str
) -> None:
    machine(gpus, tensorrt_rtx="1.7.1.116")
    write_json(tmp_path / "engine.json", {**ENGINE, **record})
    with pytest.raises(InputError) as caught:
        check_engine(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'model.engine'}: {text}"


def test_engine_of_this_build_is_taken(machine: Install, tmp_path: Path) -> None:
    machine(["9.0"], tensorrt_rtx="1.7.1.116")
    write_json(tmp_path / "engine.json", ENGINE)
    assert check_engine(tmp_path) == ENGINE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edition": "other"}, 'edition: got "other", expected one of the values it may have'),
        ({"version": 3}, "version: got 3, expected a string"),
        (
            {"profiles": ENGINE["profiles"][:1]},
            "profiles: got a list of 1, expected a length of at least 2",
        ),
        (
            {
                "profiles": [
                    ENGINE["profiles"][0],
                    {"name": "decode", "inputs": {"input_ids": {"min": [1]}}},
                ]
            },
            'profiles[1].inputs["input_ids"]: got no opt, expected a whole record',
        ),
        ({"layers": {"PLUGIN_V3": "8"}}, 'layers["PLUGIN_V3"]: got "8", expected a whole number'),
        (
            {"plugin_library": {"name": "libanybit_plugins.so"}},
            "plugin_library: got no sha256, expected a whole record",
        ),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_json(tmp_path / "engine.json", ENGINE | change)
    with pytest.raises(InputError) as caught:
        check_engine(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'engine.json'}, {message}. It is damaged: build the engine again."
    )


def test_missing_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_engine(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'engine.json'}: got no such file, expected a JSON file. It is damaged: build "
        "the engine again."
    )
