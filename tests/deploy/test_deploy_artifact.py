"""Every way in which an artefact folder can be unfit gives one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from deploy.artifact import check_artifact, choose_runner, open_artifact

from plugins.errors import InputError

Pretend = Callable[[list[str]], None]
DAMAGED = "The artefact is damaged: make this stage again"
MAKE = "Make it with: python -m exporter MODEL --wbits W --abits A --until {stage} --out {out}"


def refused(out: Path, runner: str = "onnxruntime") -> str:
    with pytest.raises(InputError) as error:
        open_artifact(out, runner)
    return str(error.value)


def test_a_whole_artefact_passes(artifact: Path) -> None:
    for runner in ("torch", "onnxruntime"):
        check_artifact(artifact, runner)


def test_a_missing_folder_and_a_file(tmp_path: Path) -> None:
    fix = "Make one with: python -m exporter MODEL --wbits W --abits A --out DIR."
    assert (
        refused(tmp_path / "none")
        == f"{tmp_path / 'none'}: got no such folder, expected an artefact folder. {fix}"
    )
    (tmp_path / "file").touch()
    assert (
        refused(tmp_path / "file")
        == f"{tmp_path / 'file'}: got a file, expected an artefact folder. {fix}"
    )


@pytest.mark.parametrize(
    ("stage", "runner"), [("quant", "torch"), ("onnx", "onnxruntime"), ("engine", "tensorrt")]
)
def test_a_missing_stage(copy: Path, stage: str, runner: str) -> None:
    shutil.rmtree(copy / stage, ignore_errors=True)
    fix = MAKE.format(stage=stage, out=copy)
    assert (
        refused(copy, runner)
        == f"{copy}: got no {stage} folder, expected it for --runner {runner}. {fix}."
    )


def test_a_stage_that_the_manifest_does_not_know(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["stages"]["onnx"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert refused(copy) == (
        f"{copy}: got no onnx folder, expected it for --runner onnxruntime, listed in "
        f"manifest.json. "
        f"{MAKE.format(stage='onnx', out=copy)}."
    )


def test_quant_alone_needs_no_manifest(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    check_artifact(copy, "torch")
    assert refused(copy) == (
        f"{copy / 'manifest.json'}: got no such file, expected a JSON file of an artefact folder. "
        "Check the path, or make the artefact with python -m exporter."
    )


def test_a_damaged_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text("[]")
    assert refused(copy) == f"{path}: got a JSON list, expected an object. Make this stage again."
    path.write_text('{"format": 1, "request": {}, "stages": {"quant": 3}}')
    assert refused(copy) == (
        f"{path}: got a broken record of stage quant, expected the manifest of an artefact folder. "
        "It is damaged: export the model again into a new folder."
    )
    assert refused(copy, "auto") == refused(copy)


def test_a_truncated_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    message = refused(copy)
    assert message.startswith(f"{copy / 'manifest.json'}: got unreadable JSON (")
    assert message.endswith(
        "), expected a whole file. It is truncated or damaged: make this stage again."
    )


def test_truncated_and_changed_weights(copy: Path) -> None:
    path = copy / "onnx" / "model.onnx.data"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert refused(copy) == f"{path}: got {len(whole) - 1} bytes, expected {len(whole)}. {DAMAGED}."
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    message = refused(copy)
    assert message.startswith(f"{path}: got SHA-256 ") and message.endswith(f"{DAMAGED}.")
    path.unlink()
    assert refused(copy) == f"{path}: got no such file, expected it from the manifest. {DAMAGED}."


def test_a_changed_quant_json(copy: Path) -> None:
    path = copy / "quant" / "quant.json"
    path.write_text(path.read_text().replace('"abits": 8', '"abits": 4'))
    message = refused(copy, "torch")
    assert message.startswith(f"{path}: got SHA-256 ") and message.endswith(f"{DAMAGED}.")


def test_changed_quantised_weights(copy: Path) -> None:
    path = copy / "quant" / "model-00001-of-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for runner in ("torch", "onnxruntime"):
        message = refused(copy, runner)
        assert message.startswith(f"{path}: got SHA-256 ") and message.endswith(
            "The folder is damaged: quantise the model again."
        )


def test_no_cuda_device(engine_record: Callable[..., Path], pretend_gpus: Pretend) -> None:
    pretend_gpus([])
    assert refused(engine_record(), "tensorrt") == (
        "--runner tensorrt: got no CUDA device, expected one to run the engine. "
        "Use --runner onnxruntime, or run on a machine with an NVIDIA GPU and its driver."
    )


def test_an_engine_of_another_version(
    engine_record: Callable[..., Path], pretend_gpus: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpus(["8.9"])
    out = engine_record(version="1.6.0.1")
    message = (
        f"{out / 'engine' / 'model.engine'}: got an engine of tensorrt-rtx 1.6.0.1, expected "
        f"one of the installed tensorrt-rtx "
        "1.7.1.116. Build the engine again on this machine (python -m exporter ... --resume)."
    )
    assert refused(out, "tensorrt") == message
    assert choose_runner(out, "auto") == "onnxruntime"
    assert capsys.readouterr().err == f"Using onnxruntime: {message}\n"


def test_auto_takes_the_engine_only_where_it_fits(
    artifact: Path, engine_record: Callable[..., Path], pretend_gpus: Pretend
) -> None:
    out = engine_record()
    for gpus, expected in (([], "onnxruntime"), (["8.9"], "tensorrt")):
        pretend_gpus(gpus)
        assert choose_runner(out, "auto") == expected
        assert choose_runner(artifact, "auto") == "onnxruntime"  # no engine there
    (out / "manifest.json").write_bytes((artifact / "manifest.json").read_bytes())
    assert (
        choose_runner(out, "auto") == "onnxruntime"
    )  # an engine on the disk that the manifest does not list
