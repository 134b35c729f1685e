"""What is written for Polygraphy: inputs and golden outputs that belong together, scripts that run."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.__main__ import main
from deploy.polygraphy import scripts
from tests.exporter.planted import change_tensor


def run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def test_inputs_and_golden_outputs(artifact: Path, tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults

    folder = tmp_path / "poly"
    assert main(["polygraphy", str(artifact), "--to", str(folder), "--tokens", "12"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "cpu.sh",
        "decode.npz",
        "golden_decode.json",
        "golden_prefill.json",
        "inputs.py",
        "inspect.sh",
        "prefill.npz",
        "with_plugins.py",
    ]
    graph = onnx.load(artifact / "onnx" / "model.onnx", load_external_data=False).graph
    load = runpy.run_path(str(folder / "inputs.py"))
    (prefill,), (decode,) = list(load["prefill"]()), list(load["decode"]())
    for inputs, new, past in ((prefill, 12, 0), (decode, 1, 12)):
        assert inputs.keys() == {value.name for value in graph.input}
        assert inputs["input_ids"].shape == (1, new)
        assert inputs["past_key_values.1.key"].shape == (1, 2, past, 16)
    golden = RunResults.load(str(folder / "golden_prefill.json"))["onnxruntime"][0]
    assert set(golden) == {value.name for value in graph.output}
    assert np.array_equal(golden["present.1.value"], decode["past_key_values.1.value"])
    assert golden["logits"][0, -1].argmax() == decode["input_ids"][0, 0]


def test_scripts_of_an_engine(
    engine_record: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = engine_record(decomposable_attention=True)
    made = scripts(out)
    assert list(made) == ["cpu", "inspect", "convert", "prefill", "decode", "engine"]
    for name in ("convert", "prefill", "decode"):
        assert made[name].count("--trt-max-shapes") == 2, name
        assert "--decomposable-attentions" in made[name] and "--strongly-typed" not in made[name]
    assert "export POLYGRAPHY_USE_TENSORRT_RTX=1" in made["engine"]
    assert f"OUT={out}\n" in made["cpu"] and "PLUGINS" not in made["cpu"]
    assert "'input_ids:[2,64]'" in made["convert"]
    assert '"${cache0[@]/%/:[2,2,63,16]}"' in re.sub(r"cache\d", "cache0", made["convert"])
    threshold = re.findall(r"--snr-threshold ([\d.]+)", made["prefill"])
    assert len(threshold) == 1 and 15 < float(threshold[0]) < 40
    again = scripts_of_the_data_centre_edition(out)
    assert "--strongly-typed" in again["convert"] and "RTX" not in again["convert"]
    assert main(["polygraphy", str(out), "--to", str(out / "onnx")]) == 2
    assert capsys.readouterr().err.startswith(f"--to {out / 'onnx'}: got a folder in the artifact ")


def scripts_of_the_data_centre_edition(out: Path) -> dict[str, str]:
    from calibration.out.files import write_json
    from calibration.out.json_file import read_json

    path = out / "engine" / "engine.json"
    write_json(path, read_json(path) | {"edition": "tensorrt", "version": "10.15.1"})
    return scripts(out)


def test_a_bfloat16_model(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporter.__main__ import main as export

    out = tmp_path / "out"
    words = [str(tiny_model_dir), "--wbits", "8", "--abits", "8", "--method", "rtn"]
    words += ["--dtype", "bfloat16", "--out", str(out), "--until", "onnx", "--offline"]
    assert export([*words, "--progress", "none"]) == 0
    capsys.readouterr()
    assert main(["polygraphy", str(out), "--to", str(tmp_path / "poly")]) == 2
    assert capsys.readouterr().err == (
        f"{out}: got a bfloat16 model, expected float16 or float32: Polygraphy's files are numpy's, "
        "which has no such type. Export with --dtype float16.\n"
    )


@pytest.mark.slow
def test_the_cpu_script_passes_and_fails(copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "poly"
    assert main(["polygraphy", str(copy), "--to", str(folder), "--tokens", "12"]) == 0
    done = run(folder / "cpu.sh")
    assert done.returncode == 0 and done.stdout.count("PASSED | Runtime") == 2, done.stdout[-2000:]

    def wrong(scale: np.ndarray) -> None:
        scale *= 4

    change_tensor(copy, "model.layers.1.mlp.down_proj.scale", wrong)
    done = run(folder / "cpu.sh")
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_the_convert_script_builds_an_engine(
    engine_record: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from plugins.tools.build import build_library

    out, folder = engine_record(), tmp_path / "poly"
    shutil.copy(build_library(), out / "engine" / "libanybit_plugins.so")
    assert main(["polygraphy", str(out), "--to", str(folder), "--tokens", "12"]) == 0
    done = run(folder / "convert.sh")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert (folder / "trt.engine").stat().st_size > 10_000
