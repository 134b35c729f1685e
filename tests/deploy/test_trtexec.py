"""The trtexec scripts: run with a tool that writes down what it is given: shapes that fit the model and
each other, plugin flags, names of real nodes, flags by version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from deploy.__main__ import main
from deploy.trtexec import TOOLS, latencies, scripts
from plugins.errors import InputError

SUMMARY = """[I] === Performance summary ===
[I] Throughput: 401.5 qps
[I] Latency: min = 2.51 ms, max = 3.02 ms, mean = 2.6 ms, median = 2.58 ms, percentile(90%) = 2.7 ms
[I] GPU Compute Time: min = 1.5 ms, max = 2.02 ms, mean = 1.6 ms, median = 1.58 ms, \
percentile(90%) = 1.7 ms, percentile(95%) = 1.8 ms, percentile(99%) = 2.0 ms
""".replace("\\\n", "")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """tool("trtexec", "exit 3") puts a program on the PATH that appends its name and arguments to a
    file, one a line and an empty line behind them, and then does that; returns the file.
    """

    def make(program: str, then: str = "") -> Path:
        folder, told = tmp_path / "bin", tmp_path / "told.txt"
        folder.mkdir(exist_ok=True)
        text = f"#!/bin/sh\nprintf '%s\\n' {program} \"$@\" '' >> {told}\n{then}\n"
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return told

    return make


@pytest.fixture
def commands(tool: Callable[[str, str], Path]) -> Callable[[Path, str], list[list[str]]]:
    """commands(out, program) -> what each script gives the program."""

    def run(out: Path, program: str = "tensorrt_rtx") -> list[list[str]]:
        told = tool(program, "")
        for text in scripts(out).values():
            subprocess.run(["bash", "-c", text], check=True)
        return [command.splitlines() for command in told.read_text().split("\n\n")[:-1]]

    return run


def option(command: list[str], name: str) -> str:
    values = [word.split("=", 1)[1] for word in command if word.startswith(f"--{name}=")]
    assert len(values) == 1, (name, command)
    return values[0]


def shapes(text: str) -> dict[str, list[int]]:
    return {
        name: [int(size) for size in dims.split("x")]
        for name, dims in (item.rsplit(":", 1) for item in text.split(","))
    }


Commands = Callable[..., list[list[str]]]


def test_commands(engine_record: Callable[..., Path], commands: Commands) -> None:
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


def test_the_build_command_has_both_profiles_in_order(
    engine_record: Callable[..., Path], commands: Commands
) -> None:
    build = commands(engine_record())[0]
    order = [word.split("=")[0] for word in build if "rofile" in word or "Shapes" in word]
    one = ["--profile", "--minShapes", "--optShapes", "--maxShapes"]
    assert order == one + one
    most = [shapes(word.split("=", 1)[1]) for word in build if word.startswith("--maxShapes=")]
    assert [shape["input_ids"] for shape in most] == [[2, 64], [2, 1]]


def test_fp32_attention_is_named(engine_record: Callable[..., Path], commands: Commands) -> None:
    names = ["attention", "attention_147"]
    out = engine_record(decomposable_attention=True, attentions=names)
    assert option(commands(out)[0], "decomposableAttentions").split(",") == names


def test_the_data_centre_edition_has_its_own_tool(
    engine_record: Callable[..., Path], commands: Commands
) -> None:
    out = engine_record(edition="tensorrt", version="10.15.1.29")
    build, *times = commands(out, "trtexec")
    assert {command[0] for command in (build, *times)} == {"trtexec"}
    assert "--stronglyTyped" in build


def test_no_engine(artifact: Path) -> None:
    with pytest.raises(InputError) as error:
        scripts(artifact)
    assert str(error.value) == (
        f"{artifact / 'engine' / 'engine.json'}: got no such file, expected the record of a "
        f"built engine. "
        f"Build one with: python -m exporter MODEL --wbits W --abits A --until engine --out {artifact}."
    )


def test_a_damaged_record(engine_record: Callable[..., Path]) -> None:
    out = engine_record(profiles=None)
    with pytest.raises(InputError) as error:
        scripts(out)
    assert str(error.value) == (
        f"{out / 'engine' / 'engine.json'}, profiles: got null, expected a list. "
        "It is damaged: build the engine again."
    )


@pytest.mark.parametrize(
    ("edition", "version", "flags", "attention"),
    [
        ("tensorrt", "10.0.1", ["--skipInference", "--stronglyTyped"], False),
        ("tensorrt", "10.13.3.9", ["--skipInference", "--stronglyTyped"], False),
        ("tensorrt", "10.14.1", ["--skipInference", "--stronglyTyped"], True),
        ("tensorrt", "11.0.0", ["--skipInference"], True),
        ("tensorrt", "11.4.1", ["--skipInference"], True),
        ("tensorrt-rtx", "1.7.1.116", ["--skipInference"], True),
    ],
)
def test_flags_by_version(
    engine_record: Callable[..., Path],
    edition: str,
    version: str,
    flags: list[str],
    attention: bool,
) -> None:
    out = engine_record(edition=edition, version=version, attentions=["attention"])
    build = scripts(out)["build"]
    program = {"tensorrt": "\ntrtexec ", "tensorrt-rtx": "\ntensorrt_rtx "}[edition]
    assert program in build
    assert re.findall(r"^ *(--\w+)(?: \\)?$", build, re.M) == flags
    assert ("--decomposableAttentions=" in build) is attention


def test_too_old_a_tensorrt(engine_record: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as error:
        scripts(engine_record(edition="tensorrt", version="8.6.1"))
    assert str(error.value) == (
        "engine.json: got tensorrt 8.6.1, expected 10.0 or later. Build the engine again with a "
        "newer TensorRT."
    )
    assert all(tool.build for tool in TOOLS.values())


def test_many_layers_are_short_and_in_natural_order(
    engine_record: Callable[..., Path], commands: Commands
) -> None:
    out = engine_record()
    path = out / "engine" / "engine.json"
    record: dict[str, Any] = json.loads(path.read_text())
    for profile in record["profiles"]:
        inputs = profile["inputs"]
        for layer in range(30):
            for part in ("key", "value"):
                inputs[f"past_key_values.{layer}.{part}"] = inputs["past_key_values.0.key"]
    path.write_text(json.dumps(record, sort_keys=True))
    assert sum(map(len, scripts(out).values())) < 5000
    names = [*shapes(option(commands(out)[1], "shapes"))]
    cache = [name for name in names if name.startswith("past")]
    assert cache == [
        f"past_key_values.{layer}.{part}" for layer in range(30) for part in ("key", "value")
    ]
    # Layers of other shapes, in one profile too, are groups of their own, whatever is left is named one by one.
    for profile in record["profiles"]:
        other = {
            key: [*shape[:2], shape[2], 8] for key, shape in inputs["past_key_values.0.key"].items()
        }
        for name in ("past_key_values.3.key", "past_key_values.7.value"):
            profile["inputs"][name] = other
    path.write_text(json.dumps(record, sort_keys=True))
    found = shapes(option(commands(out)[-1], "shapes"))
    assert found.keys() == set(names)
    assert [name for name, shape in found.items() if shape[-1] == 8 and len(shape) == 4] == [
        "past_key_values.3.key",
        "past_key_values.7.value",
    ]


def test_scripts_go_where_they_are_told(
    engine_record: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = engine_record(), tmp_path / "scripts"
    assert main(["trtexec", str(out), "--to", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(folder / f"{name}.sh") for name in ("build", "prefill", "decode")
    ]
    assert os.access(folder / "decode.sh", os.X_OK)
    assert (folder / "decode.sh").read_text() == scripts(out)["decode"]
    assert main(["trtexec", str(out), "--to", str(out / "engine")]) == 2
    assert capsys.readouterr().err == (
        f"--to {out / 'engine'}: got a folder in or around the artifact {out}, expected one beside "
        f"it. Choose another, such as --to {out}-trtexec.\n"
    )
    assert main(["trtexec", str(out)]) == 0
    text = capsys.readouterr().out
    assert text == "\n".join(scripts(out).values()) and len(text) < 5000


def test_they_run_where_the_tool_is(
    engine_record: Callable[..., Path],
    tool: Callable[[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = engine_record()
    monkeypatch.setenv("PATH", "")
    assert main(["trtexec", str(out), "--run"]) == 2
    assert capsys.readouterr().err == (
        "--run: got no tensorrt_rtx on the PATH, expected NVIDIA's tool. Install TensorRT's command "
        "line tools, or copy the scripts to where they are (--to).\n"
    )
    monkeypatch.undo()
    (tmp_path / "summary").write_text(SUMMARY)
    then = f'case "$*" in *--onnx*) ;; *) cat {tmp_path}/summary;; esac'
    tool("tensorrt_rtx", then)
    before = sorted(path for path in out.rglob("*"))
    assert main(["trtexec", str(out), "--run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ms on the GPU          min      median      p(90%)      p(99%)",
        "prefill              1.500       1.580       1.700       2.000",
        "decode               1.500       1.580       1.700       2.000",
    ]
    assert sorted(path for path in out.rglob("*")) == before
    tool("tensorrt_rtx", "echo no such plugin >&2; exit 1")
    assert main(["trtexec", str(out), "--run"]) == 3
    assert capsys.readouterr().err == (
        "build.sh: got exit code 1 from tensorrt_rtx, expected 0. Look at what it says below.\n"
        "no such plugin\n"
    )


def test_no_summary_is_no_latency() -> None:
    assert latencies("[I] Engine built in 3 s") == {}
    assert latencies(SUMMARY)["percentile(99%)"] == 2.0
