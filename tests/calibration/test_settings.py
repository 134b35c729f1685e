"""Settings: presets, switches and what the user gives over them, and what a wrong switch is told."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from calibration.methods import find_method, method_names
from calibration.methods.abq.settings import AbqSettings
from calibration.methods.qqq.settings import QqqSettings
from calibration.quant.scheme import QuantScheme
from calibration.settings import (
    EFFORTS,
    CalibrationSettings,
    MethodSettings,
    calibration_settings,
)
from plugins.errors import InputError

NAMES = ", ".join(item.name for item in fields(QqqSettings))
KINDS = {"qqq": QqqSettings, "abq": AbqSettings, "rtn": MethodSettings}


def _settings(
    method: str, effort: str, switches: list[str] | None = None, bits: str = "4 8", **given: Any
) -> CalibrationSettings:
    wbits, abits = map(int, bits.replace("*", "").split())
    scheme = QuantScheme("ABQGemm", method, wbits, abits, balanced="*" in bits)
    kind = find_method(method).settings
    return calibration_settings(kind, scheme, effort, switches or [], **given)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(("method", "kind"), KINDS.items())
def test_presets(effort: str, method: str, kind: type) -> None:
    settings = _settings(method, effort)
    data = EFFORTS[effort]
    assert (settings.effort, settings.nsamples, settings.seqlen) == (
        effort,
        data["nsamples"],
        data["seqlen"],
    )
    assert type(settings.method) is kind
    preset = kind.preset(effort, QuantScheme("ABQGemm", method, 4, 8))
    assert settings.method == kind(**preset)
    if effort == "default":
        assert not preset


def test_the_papers_own_recipes() -> None:
    assert _settings("qqq", "paper").method == QqqSettings("none", "all", clip_steps=1, correct=0.0)
    common: dict[str, Any] = {
        "rotation": "none",
        "clip_steps": 1,
        "correct": 0.0,
        "gptq": False,
        "refits": 0,
        "tune": 0,
        "train_windows": 128,
    }
    for bits, epochs in (("4 8", 20), ("2 8", 20), ("8 8", 40), ("2* 8", 40), ("1* 4", 40)):
        assert _settings("abq", "paper", bits=bits).method == AbqSettings(**common, epochs=epochs)
    assert _settings("abq", "paper", ["epochs=3"], "8 8").method.epochs == 3  # the user's word
    assert _settings("abq", "fast").method == AbqSettings(tune=0, refits=0)


def test_more_effort_is_more_data() -> None:
    sizes = [
        EFFORTS[effort]["nsamples"] * EFFORTS[effort]["seqlen"]
        for effort in ("fast", "default", "paper")
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert EFFORTS["paper"] == {"nsamples": 128, "seqlen": 2048}  # both papers'
    assert _settings("qqq", "default") == replace(CalibrationSettings(), method=QqqSettings())


def test_presets_name_switches_that_exist() -> None:
    assert set(KINDS) == set(method_names())
    for effort, data in EFFORTS.items():
        assert set(data) <= {item.name for item in fields(CalibrationSettings)}
        for kind in KINDS.values():
            for bits in ((2, True), (4, False), (8, False)):
                preset = kind.preset(effort, QuantScheme("ABQGemm", "", bits[0], 8, bits[1]))
                assert set(preset) <= {item.name for item in fields(kind)}


def test_what_is_given_wins_over_the_preset() -> None:
    settings = _settings(
        "qqq",
        "paper",
        ["rotation=none", "smooth=all", "gptq=OFF", "damp=0", "correct=0.25", "damp=0.5"],
        nsamples=3,
        seqlen=None,
        calib="text.txt",
        seed=9,
        max_memory=0,
    )
    chosen = QqqSettings(
        "none",
        "all",
        gptq=False,
        damp=0.5,
        correct=0.25,
        clip_steps=1,
    )
    assert settings == CalibrationSettings("paper", "text.txt", 3, 2048, 9, 0, chosen)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        (
            "rotate=none",
            f"got the switch 'rotate', expected one of qqq's: {NAMES}. Write --set NAME=VALUE.",
        ),
        ("", f"got the switch '', expected one of qqq's: {NAMES}. Write --set NAME=VALUE."),
        (
            "rotation=hadamar",
            "got 'hadamar', expected one of hadamard, orthogonal, values, none. Give one of these.",
        ),
        ("smooth", "got '', expected one of none, all, down. Give one of these."),
        ("gptq=perhaps", "got 'perhaps', expected on or off. The default is gptq=on."),
        (
            "clip_steps=1.5",
            "got '1.5', expected a whole number of at least 0. The default is "
            "clip_steps={clip_steps}.",
        ),
        (
            "clip_steps=-1",
            "got '-1', expected a whole number of at least 0. The default is "
            "clip_steps={clip_steps}.",
        ),
        ("damp=much", "got 'much', expected a number of at least 0. The default is damp={damp}."),
        ("damp=nan", "got 'nan', expected a number of at least 0. The default is damp={damp}."),
        ("damp=inf", "got 'inf', expected a number of at least 0. The default is damp={damp}."),
        ("damp=", "got '', expected a number of at least 0. The default is damp={damp}."),
    ],
)
def test_wrong_switches(switch: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        _settings("qqq", "default", ["gptq=on", switch])
    assert str(caught.value) == f"--set {switch}: {message.format(**vars(QqqSettings()))}"


def test_a_method_without_switches() -> None:
    with pytest.raises(InputError) as caught:
        _settings("rtn", "default", ["damp=1"])
    assert (
        str(caught.value)
        == "--set damp=1: got the switch 'damp', expected one of rtn's: none. Write --set NAME=VALUE."
    )


@pytest.mark.parametrize("word", ["on", "off", "true", "false", "1", "0", "On"])
def test_words_for_on_and_off(word: str) -> None:
    settings = _settings("qqq", "default", [f"act_order={word}"]).method
    assert settings.act_order is (word.lower() in ("on", "true", "1"))


def test_every_switch_counts_in_the_plain_form_and_memory_does_not() -> None:
    base = _settings("qqq", "default")
    plain = base.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["switches"] == vars(base.method) and plain["calib"] == "default"
    assert replace(base, max_memory=1).as_dict() == plain
    assert replace(base, method_file=Path("my_method.py")).as_dict() == plain
    for change in (
        {"effort": "fast"},
        {"calib": "text.txt"},
        {"nsamples": 1},
        {"seqlen": 8},
        {"seed": 1},
        {"method": QqqSettings(damp=1)},
    ):
        assert replace(base, **change).as_dict() != plain  # type: ignore[arg-type]
