"""Settings: presets, switches and what the user gives over them, and what a wrong switch is told."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from calibration.settings import (
    EFFORTS,
    METHOD_SETTINGS,
    AbqSettings,
    CalibrationSettings,
    NoSettings,
    QqqSettings,
    calibration_settings,
)
from plugins.errors import InputError

NAMES = ", ".join(item.name for item in fields(QqqSettings))


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(
    ("method", "kind"), [("qqq", QqqSettings), ("abq", AbqSettings), ("rtn", NoSettings)]
)
def test_presets(effort: str, method: str, kind: type) -> None:
    settings = calibration_settings(method, effort)
    data = EFFORTS[effort]["data"]
    assert (settings.effort, settings.nsamples, settings.seqlen) == (
        effort,
        data["nsamples"],
        data["seqlen"],
    )
    assert type(settings.method) is kind
    for name, value in EFFORTS[effort].get(method, {}).items():
        assert getattr(settings.method, name) == value


def test_more_effort_is_more_data() -> None:
    sizes = [
        EFFORTS[effort]["data"]["nsamples"] * EFFORTS[effort]["data"]["seqlen"]
        for effort in ("fast", "default", "paper")
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert EFFORTS["paper"]["data"] == {"nsamples": 128, "seqlen": 2048}  # both papers'
    assert calibration_settings("qqq", "default") == replace(
        CalibrationSettings(), method=QqqSettings()
    )


def test_presets_name_switches_that_exist() -> None:
    for preset in EFFORTS.values():
        for method, values in preset.items():
            known = {
                item.name
                for item in fields(
                    CalibrationSettings if method == "data" else METHOD_SETTINGS[method]
                )
            }
            assert set(values) <= known


def test_what_is_given_wins_over_the_preset() -> None:
    settings = calibration_settings(
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
        clip_steps=EFFORTS["paper"]["qqq"]["clip_steps"],
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
            "got 'hadamar', expected one of hadamard, orthogonal, none. Give one of these.",
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
        calibration_settings("qqq", "default", ["gptq=on", switch])
    assert str(caught.value) == f"--set {switch}: {message.format(**vars(QqqSettings()))}"


def test_a_method_without_switches() -> None:
    with pytest.raises(InputError) as caught:
        calibration_settings("rtn", "default", ["damp=1"])
    assert (
        str(caught.value)
        == "--set damp=1: got the switch 'damp', expected one of rtn's: none. Write --set NAME=VALUE."
    )


@pytest.mark.parametrize("word", ["on", "off", "true", "false", "1", "0", "On"])
def test_words_for_on_and_off(word: str) -> None:
    settings = calibration_settings("qqq", "default", [f"act_order={word}"]).method
    assert isinstance(settings, QqqSettings) and settings.act_order is (
        word.lower() in ("on", "true", "1")
    )


def test_every_switch_counts_in_the_plain_form_and_memory_does_not() -> None:
    base = calibration_settings("qqq", "default")
    plain = base.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["switches"] == vars(base.method) and plain["calib"] == "default"
    assert replace(base, max_memory=1).as_dict() == plain
    for change in (
        {"effort": "fast"},
        {"calib": "text.txt"},
        {"nsamples": 1},
        {"seqlen": 8},
        {"seed": 1},
        {"method": QqqSettings(damp=1)},
    ):
        assert replace(base, **change).as_dict() != plain  # type: ignore[arg-type]
