"""Every way in which an artefact folder can be unfit gives one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.out.files import write_json
from calibration.out.folder import command_for
from deploy.__main__ import main
from exporter.run.model import choose_runner, find_model, open_session
from plugins.errors import InputError

TEXT = str(Path(__file__).resolve().parents[2] / "calibration" / "default_text.txt")
Pretend = Callable[[list[str]], None]
DAMAGED = "The artifact is damaged: make this stage again"
MAKE = "Make it with: python -m exporter MODEL --wbits W --abits A --until {stage} --out {out}"


def refused(out: Path, runner: str = "onnxruntime") -> str:
    with pytest.raises(InputError) as error:
        open_session(runner, out)
    return str(error.value)


def test_a_whole_artefact_passes(artifact: Path) -> None:
    for runner in ("torch", "onnxruntime"):
        open_session(runner, artifact).close()


def test_a_missing_folder_and_a_file(tmp_path: Path) -> None:
    fix = "Make one with: python -m exporter MODEL --wbits W --abits A --out DIR."
    assert (
        refused(tmp_path / "none")
        == f"{tmp_path / 'none'}: got no such folder, expected an artifact folder. {fix}"
    )
    (tmp_path / "file").touch()
    assert (
        refused(tmp_path / "file")
        == f"{tmp_path / 'file'}: got a file, expected an artifact folder. {fix}"
    )


@pytest.mark.parametrize(
    ("stage", "runner"), [("quant", "torch"), ("onnx", "onnxruntime"), ("engine", "tensorrt")]
)
def test_a_missing_stage(copy: Path, pretend_gpus: Pretend, stage: str, runner: str) -> None:
    pretend_gpus(["8.9"])
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
    open_session("torch", copy).close()
    assert refused(copy) == (
        f"{copy / 'manifest.json'}: got no such file, expected a JSON file. It is damaged or of "
        "another version: export the model again into a new folder."
    )


def test_a_damaged_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text("[]")
    again = "It is damaged or of another version: export the model again into a new folder."
    assert refused(copy) == f"{path}: got a JSON list, expected an object. {again}"
    path.write_text('{"format": 1, "request": {}, "stages": {"quant": 3}}')
    assert refused(copy) == (f"{path}, stages.quant: got 3, expected an object. {again}")
    assert refused(copy, "auto") == refused(copy)


def test_a_truncated_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    message = refused(copy)
    assert message.startswith(f"{copy / 'manifest.json'}: got unreadable JSON (")
    assert message.endswith(
        "), expected a whole file. It is damaged or of another version: export the model again into "
        "a new folder."
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
    message = refused(copy, "torch")
    assert message.startswith(f"{path}: got SHA-256 ") and message.endswith(f"{DAMAGED}.")
    open_session("onnxruntime", copy).close()  # does not read them
    (copy / "manifest.json").unlink()
    assert refused(copy, "torch") == message


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
    assert choose_runner(out).name == "native"
    assert capsys.readouterr().err == f"Not using tensorrt: {message}\n"


def test_auto_takes_the_engine_only_where_it_fits(
    artifact: Path, engine_record: Callable[..., Path], pretend_gpus: Pretend
) -> None:
    out = engine_record()
    for gpus, expected in (([], "native"), (["8.9"], "tensorrt")):
        pretend_gpus(gpus)
        assert choose_runner(out).name == expected
        assert choose_runner(artifact).name == "native"  # no engine there
    (out / "manifest.json").write_bytes((artifact / "manifest.json").read_bytes())
    assert (
        choose_runner(out).name == "native"
    )  # an engine on the disk that the manifest does not list


def test_a_missing_stage_names_the_command_that_made_the_others(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["command"] = [
        *("python", "-m", "exporter", "my model", "--wbits", "4", "--out=where/it/was"),
        *("--until", "onnx", "--engine", "none", "--resume"),
    ]
    write_json(path, manifest)
    shutil.rmtree(copy / "onnx")
    command = f"python -m exporter 'my model' --wbits 4 --out {copy} --engine"
    assert refused(copy) == (
        f"{copy}: got no onnx folder, expected it for --runner onnxruntime. "
        f"Make it with: {command} none --until onnx --resume."
    )
    assert command_for(copy, "engine") == f"{command} auto --until engine --resume"


def test_an_artifact_of_an_older_version_is_refused_with_the_command_that_renews_it(
    copy: Path,
) -> None:
    path = copy / "onnx" / "model.json"
    path.unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["stages"]["onnx"]["files"]["model.json"]
    write_json(copy / "manifest.json", manifest)
    message = "got no such file, expected it in a folder made by this version. Renew it with: "
    assert refused(copy) == f"{path}: {message}{MAKE.format(stage='onnx', out=copy)[14:]}."
    alone = shutil.copytree(copy / "onnx", copy.parent / "alone")
    assert refused(alone) == (
        f"{alone / 'model.json'}: {message}python -m exporter MODEL --wbits W --abits A "
        f"--until onnx --out OUT --resume."
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, ": got format 2, expected 1"),
        ({"max_context": "many"}, ', max_context: got "many", expected a whole number'),
        ({"cache": {"layers": 2}}, ", cache: got no heads, expected a whole record"),
    ],
)
def test_a_description_of_another_format(
    copy: Path, change: dict[str, object], problem: str
) -> None:
    path = copy / "onnx" / "model.json"
    write_json(path, json.loads(path.read_text()) | change)
    message = refused(copy / "onnx")
    assert message.startswith(f"{path}{problem}. Renew it with: python -m exporter MODEL ")


# ---------------------------------------------------------------- shipped alone


def test_the_onnx_folder_alone_runs(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(artifact / "onnx", tmp_path / "shipped")
    command = ["--prompt", "The river", "--max-new-tokens", "5"]
    texts = []
    for out in (artifact, alone, artifact / "onnx"):
        assert main(["generate", str(out), *command]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert captured.err.endswith(" s, native\n")
    assert texts[0] == texts[1] == texts[2]
    scored = ["--text", TEXT, "--first", "1", "--seqlen", "64", "--progress", "none"]
    assert main(["eval", str(alone), *scored]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 63


def test_a_damaged_file_of_a_folder_alone(copy: Path) -> None:
    alone = copy / "onnx"
    for name in ("model.onnx.data", "model.onnx"):
        path = alone / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert refused(alone).startswith(f"{path}: got SHA-256 ")
        path.write_bytes(whole)
    tokenizer = alone / "tokenizer.json"
    tokenizer.write_text("{}")
    model = find_model(alone)
    with pytest.raises(InputError, match=r"tokenizer.json: got 2 bytes, expected "):
        model.tokenizer()


def test_a_tokenizer_file_that_nobody_recorded(copy: Path) -> None:
    extra = copy / "onnx" / "special_tokens_map.json"
    extra.write_text("{}")
    with pytest.raises(InputError, match="got a file without a record"):
        find_model(copy).tokenizer()


def test_a_folder_alone_of_another_stage(artifact: Path, pretend_gpus: Pretend) -> None:
    pretend_gpus(["8.9"])
    assert refused(artifact / "onnx", "tensorrt") == (
        f"{artifact / 'onnx'}: got the onnx folder of an artifact, expected the whole one or its "
        f"engine folder for --runner tensorrt. Choose another --runner, or make that stage with: "
        f"python -m exporter MODEL --wbits W --abits A --until engine."
    )


def test_the_engine_folder_alone_says_why_it_cannot_run(
    engine_record: Callable[..., Path], tmp_path: Path, pretend_gpus: Pretend
) -> None:
    pretend_gpus([])
    alone = shutil.copytree(engine_record() / "engine", tmp_path / "shipped")
    assert refused(alone, "auto").startswith("--runner tensorrt: got no CUDA device, expected ")
    pretend_gpus(["8.9"])
    model = find_model(alone)
    assert model.runner.name == "tensorrt"
    assert model.tokenizer()("The river")["input_ids"]
    assert (model.description.context, model.description.max_context) == (256, 64)
    assert (model.description.max_batch, model.description.max_tokens) == (2, 64)


def test_the_description_says_what_a_service_needs(artifact: Path) -> None:
    value = json.loads((artifact / "onnx" / "model.json").read_text())
    files = value.pop("files")
    config = json.loads((artifact / "quant" / "quant.json").read_text())["config"]
    on_disk = {path.name for path in (artifact / "onnx").iterdir()} - {"model.json"}
    assert (
        on_disk
        == set(files)
        == {
            "model.onnx",
            "model.onnx.data",
            "chat.json",
            *value["tokenizer"],
        }
    )
    assert value.pop("model") and value.pop("tokenizer") == sorted(
        path.name
        for path in (artifact / "quant").iterdir()
        if path.suffix != ".safetensors" and path.name != "quant.json"
    )
    assert value == {
        "format": 1,
        "family": "llama",
        "scheme": "w8a8",
        "method": "rtn",
        "dtype": "float16",
        "sizes": {
            name: config[name]
            for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        },
        "context": 256,
        "max_context": 256,
        "max_batch": None,
        "max_tokens": None,
        "bos_token_id": 0,
        "eos_token_ids": [0],
        "sampling": {
            "do_sample": False,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
        },
        "chat_template": None,
        "cache": {
            "layers": 2,
            "heads": 2,
            "head_dim": 16,
            "bits": 16,
            "dtype": "float16",
            "token_bytes": 256,
            "form": "concat",
            "capacity": None,
            "past": "past_key_values.{layer}.{part}",
            "present": "present.{layer}.{part}",
            "parts": ["key", "value"],
        },
    }


# ---------------------------------------------------------------- what is read is what is verified


def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names, below OUT, of the files that are hashed from here on."""
    from calibration.out import files

    found: list[str] = []
    real = files.sha256_file

    def count(path: Path) -> str:
        found.append(f"{path.parent.name}/{path.name}")
        return real(path)

    for module in ("out.files", "quant.folder"):
        monkeypatch.setattr(f"calibration.{module}.sha256_file", count)
    monkeypatch.setattr("exporter.engine.edition.sha256_file", count)
    return found


def test_each_file_that_is_read_is_hashed_once_and_no_other(
    artifact: Path,
    engine_record: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    pretend_gpus: Pretend,
) -> None:
    pretend_gpus(["8.9"])
    out = engine_record()
    tokenizer = json.loads((out / "onnx" / "model.json").read_text())["tokenizer"]
    hashed = hashed_files(monkeypatch)
    monkeypatch.setattr("exporter.run.tensorrt.TensorrtSession", lambda *arguments: arguments)

    def read(runner: str, path: Path) -> list[str]:
        hashed.clear()
        model = find_model(path, runner)
        model.tokenizer()
        model.tokenizer()
        model.open()
        return sorted(hashed)

    def files(stage: str, *names: str) -> list[str]:
        return sorted(f"{stage}/{name}" for name in (*names, *tokenizer))

    onnx = ("model.onnx", "model.onnx.data", "chat.json")
    engine = ("model.engine", "libanybit_plugins.so", "engine.json", "chat.json")
    for runner in ("onnxruntime", "native"):
        assert read(runner, out) == files("onnx", "model.json", *onnx)
    assert read("onnxruntime", out / "onnx") == files("onnx", *onnx)
    assert read("tensorrt", out) == files("engine", "model.json", *engine)
    assert read("tensorrt", out / "engine") == files("engine", *engine)
    weights = "model-00001-of-00001.safetensors"
    longest = "onnx/model.json"  # says how long a sequence may be
    assert read("torch", out) == [longest, *files("quant", "quant.json", weights)]
    assert read("torch", out / "quant") == [longest, *files("quant", weights)]
    hashed.clear()
    find_model(out, "onnxruntime")
    assert hashed == ["onnx/model.json"]
