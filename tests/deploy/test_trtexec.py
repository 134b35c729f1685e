"""The printed trtexec commands: shapes that fit the model and each other, plugin flags, names of
real nodes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from deploy.trtexec import script
from plugins.errors import InputError


def commands(out: Path) -> list[list[str]]:
    return [
        line
        for line in (
            shlex.split(line, comments=True)
            for line in script(out).replace("\\\n", "").splitlines()
        )
        if line
    ]


def option(command: list[str], name: str) -> str:
    values = [word.split("=", 1)[1] for word in command if word.startswith(f"--{name}=")]
    assert len(values) == 1, (name, command)
    return values[0]


def shapes(text: str) -> dict[str, list[int]]:
    return {
        name: [int(size) for size in dims.split("x")]
        for name, dims in (item.rsplit(":", 1) for item in text.split(","))
    }


def test_commands(engine_record: Callable[..., Path]) -> None:
    out = engine_record()
    build, prefill, decode = commands(out)
    assert [command[0] for command in (build, prefill, decode)] == ["tensorrt_rtx"] * 3
    for command in (build, prefill, decode):
        assert option(command, "dynamicPlugins") == str(out / "engine" / "libanybit_plugins.so")
    assert Path(option(build, "onnx")).is_file()
    assert option(prefill, "loadEngine") == str(out / "engine" / "model.engine")
    names = {
        value.name
        for value in onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph.input
    }
    for index, command in enumerate((prefill, decode)):
        assert option(command, "useProfile") == str(index)
        found = shapes(option(command, "shapes"))
        assert found.keys() == names
        past = found["past_key_values.0.key"]
        assert past[1:2] + past[3:] == [2, 16]
        assert found["attention_mask"] == [1, found["input_ids"][1] + past[2]]
        assert (found["input_ids"][1] == 1) == (index == 1)


def test_the_build_command_has_both_profiles_in_order(engine_record: Callable[..., Path]) -> None:
    build = commands(engine_record())[0]
    order = [word.split("=")[0] for word in build if "rofile" in word or "Shapes" in word]
    one = ["--profile", "--minShapes", "--optShapes", "--maxShapes"]
    assert order == one + one
    most = [shapes(word.split("=", 1)[1]) for word in build if word.startswith("--maxShapes=")]
    assert [shape["input_ids"] for shape in most] == [[2, 64], [2, 1]]


def test_fp32_attention_is_named(engine_record: Callable[..., Path]) -> None:
    names = ["attention", "attention_147"]
    out = engine_record(decomposable_attention=True, attentions=names)
    assert option(commands(out)[0], "decomposableAttentions").split(",") == names


def test_the_data_centre_edition_has_its_own_tool(engine_record: Callable[..., Path]) -> None:
    build, *times = commands(engine_record(edition="tensorrt"))
    assert {command[0] for command in (build, *times)} == {"trtexec"}
    assert "--stronglyTyped" in build


def test_no_engine(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        script(artifact)
    assert str(error.value) == (
        f"{artifact / 'engine' / 'engine.json'}: got no such file, expected the record of a "
        f"built engine. "
        f"Build one with: python -m exporter MODEL --wbits W --abits A --until engine --out {artifact}."
    )


def test_a_damaged_record(engine_record: Callable[..., Path]) -> None:
    out = engine_record(profiles=None)
    with pytest.raises(InputError) as error:
        script(out)
    assert str(error.value) == (
        f"{out / 'engine' / 'engine.json'}, profiles: got null, expected a list. "
        "It is damaged: build the engine again."
    )
