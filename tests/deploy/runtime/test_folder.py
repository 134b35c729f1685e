"""What the C++ runtime says of folders, libraries and options that do not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from calibration.quant.scheme import QuantScheme

Run = Callable[..., Any]


@pytest.fixture
def refused(driver: Run) -> Callable[..., str]:
    """refused(folder, **load options) -> the message."""

    def run(folder: Path, **load: Any) -> str:
        return str(driver(folder, [], load, fails=True))

    return run


def edit(path: Path, *keys: str, value: Any) -> None:
    """Change a field of a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


@pytest.fixture
def alone(copy: Path) -> Path:
    """The onnx folder without the rest: its model.json has no record of itself."""
    return Path(shutil.move(copy / "onnx", copy.parent / "alone"))


def test_an_onnx_folder_runs_alone(alone: Path, driver: Run) -> None:
    assert driver(alone, [[{"tokens": [1], "max_new_tokens": 2}]])["card"]["family"] == "llama"


def test_no_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused(tmp_path / "no") == (
        f"{tmp_path}/no: got no such folder, expected an artifact folder. "
        f"Make one with: python -m exporter MODEL --wbits W --abits A --out DIR."
    )
    file = tmp_path / "file"
    file.write_text("")
    assert refused(file).startswith(f"{file}: got a file, expected an artifact folder. Make one")


def test_no_onnx_folder(copy: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def message(out: Path) -> str:
        return (
            f"{out}: got no onnx folder, expected it for the ONNX Runtime backend. Make it with: "
            f"python -m exporter MODEL --wbits W --abits A --until onnx --out {out}."
        )

    shutil.rmtree(copy / "onnx")
    assert refused(copy) == message(copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty) == message(empty)


def renew(out: str) -> str:
    return (
        f"Renew it with: python -m exporter MODEL --wbits W --abits A --until onnx --out {out} "
        f"--resume"
    )


def test_another_format(copy: Path, refused: Callable[..., str]) -> None:
    edit(copy / "manifest.json", "format", value=2)
    assert refused(copy) == (f"{copy}/manifest.json: got format 2, expected 1. {renew(str(copy))}.")


def test_another_format_of_a_folder_alone(alone: Path, refused: Callable[..., str]) -> None:
    edit(alone / "model.json", "format", value="x")
    assert refused(alone) == f'{alone}/model.json: got format "x", expected 1. {renew("OUT")}.'


DAMAGED = "It is truncated or damaged: make this stage again"
FIELDS = {
    "no number": (
        ("vocab_size", "512"),
        'vocab_size: got "512", expected a whole number from 0 to',
    ),
    "zero": (("vocab_size", 0), "vocab_size: got 0, expected at least 1"),
    "too large": (("hidden_size", 1 << 40), "hidden_size: got 1099511627776, expected a whole"),
}


@pytest.mark.parametrize("change, expected", FIELDS.values(), ids=FIELDS.keys())
def test_fields_of_the_description(
    alone: Path, refused: Callable[..., str], change: tuple[str, Any], expected: str
) -> None:
    edit(alone / "model.json", "sizes", change[0], value=change[1])
    message = refused(alone)
    assert message.startswith(f"{alone}/model.json, sizes, {expected}")
    assert message.endswith(f". {DAMAGED}.")


def test_a_name_that_leads_elsewhere(alone: Path, refused: Callable[..., str]) -> None:
    edit(alone / "model.json", "files", "../x", value={"bytes": 1, "sha256": "0" * 64})
    assert refused(alone) == (
        f"{alone}/model.json, files: got a file called ../x, expected the name of a file in this "
        f"folder. {DAMAGED}."
    )


def test_a_cache_form_that_the_graph_does_not_have(
    alone: Path, refused: Callable[..., str]
) -> None:
    edit(alone / "model.json", "cache", "form", value="static")
    edit(alone / "model.json", "cache", "capacity", value=64)
    assert refused(alone) == (
        f"{alone}/model.onnx: got a cache without write_indices, expected the static form of "
        f"model.json. The file is damaged or changed: export the model again."
    )


WRONG = [None, -1, 0, 1.5, 1e300, 1 << 70, True, "", "x", "../x", [], [[]], [-1], {}, {"x": {}}]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON value."""
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*at, key))
    return found


def test_every_field_with_every_wrong_value(
    artifact: Path, tmp_path: Path, compiled: Callable[..., Path]
) -> None:
    """Each is good or refused with the file's name and what to do; nothing else ends a program."""
    good = json.loads((artifact / "onnx" / "model.json").read_text())
    texts = []
    for place in places(good):
        for value in WRONG:
            changed = json.loads(json.dumps(good))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            texts.append(json.dumps(changed))
        del inner[place[-1]]
        texts.append(json.dumps(changed))
    whole = json.dumps(good)
    texts += [whole[:cut] for cut in range(0, len(whole), 37)]
    texts += ["[" * 100000, '{"a":' * 100000, "\ud800", '{"format": 1', '{"format": 1e999}']
    folders = []
    for i, text in enumerate([whole, *texts]):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        (folders[-1] / "model.onnx").write_bytes(b"")
        (folders[-1] / "model.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    task = json.dumps({"describe": list(map(str, folders))})
    result = subprocess.run(
        [compiled("driver")], input=task, capture_output=True, text=True, timeout=60, check=True
    )
    errors = json.loads(result.stdout)
    assert errors[0] == ""
    for folder, error in zip(folders, errors, strict=True):
        if error:
            assert error.startswith(f"{folder}/model.json")
            assert "expected" in error
    assert sum(error != "" for error in errors) > len(errors) / 2


STAGE_AGAIN = "The artifact is damaged: make this stage again"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_truncated_files(copy: Path, refused: Callable[..., str], name: str) -> None:
    path = copy / "onnx" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert refused(copy) == (
        f"{path}: got {len(data) - 1} bytes, expected {len(data)}. {STAGE_AGAIN}."
    )
    path.unlink()
    assert refused(copy) == (
        f"{path}: got no such file, expected it from the manifest. {STAGE_AGAIN}."
    )


def test_changed_files(copy: Path, refused: Callable[..., str], driver: Run) -> None:
    """The weights are hashed where that is asked for, the graph always."""
    for name, options in (("model.onnx.data", {"verify": True}), ("model.onnx", {})):
        path = copy / "onnx" / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        message = refused(copy, **options)
        assert message.startswith(f"{path}: got SHA-256 ")
        assert message.endswith(f"... {STAGE_AGAIN}."), message
        data[-1] ^= 1
        path.write_bytes(data)
    driver(copy, [], {"verify": True})


def test_bfloat16_with_a_float_head(
    tiny_model_dir: Path,
    tmp_path: Path,
    export: Callable[..., Path],
    refused: Callable[..., str],
) -> None:
    """Which ONNX Runtime has no kernel for; test_runtime_engine.py runs one with another head."""
    scheme = QuantScheme("ABQGemm", "rtn", 8, 8, dtype="bfloat16")
    out = export(tiny_model_dir, tmp_path / "out", scheme)
    message = refused(out)
    assert message.startswith(f"{out}/onnx/model.onnx: ONNX Runtime says: ")
    assert "implementation for MatMul" in message
    assert message.endswith(
        "; got a model in bfloat16, expected its head quantized and the native kernels. Export with "
        "--head-bits 8, or with --dtype float16 or float32."
    )


def test_too_little_memory(artifact: Path, refused: Callable[..., str]) -> None:
    """The cache of 100 slots with 256 tokens of 256 bytes, its copy, and what a call needs."""
    assert refused(artifact, slots=100, memory_limit=50_000_000) == (
        "memory: got 50.0 MB, expected 68.8 MB (cache 6.6 MB, its copy 0.1 MB, logits 0.0 MB, "
        "activations about 1.8 MB, float weights in fp32 0.1 MB, the program about 60.2 MB; weights "
        "0.2 MB mapped). Load with fewer slots, a smaller capacity or a smaller chunk."
    )


def test_memory_is_planned_before_the_library_is_opened(
    artifact: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "libonnxruntime.so.1").write_text("no library")
    options = {"memory_limit": 5_000_000, "onnxruntime": str(tmp_path)}
    assert refused(artifact, **options).startswith("memory: got 5.0 MB, expected ")


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_is_what_is_taken(
    tied: bool,
    tiny_llama: Callable[..., Path],
    export: Callable[..., Path],
    tmp_path: Path,
    driver: Run,
) -> None:
    """A head of 50 MB in fp32, of which ONNX Runtime keeps a copy."""
    model = tiny_llama(vocab_size=200_000, tie_word_embeddings=tied)
    out = export(model, tmp_path / "out")
    found = driver(out, [[{"tokens": [1, 2, 3], "max_new_tokens": 2}]])
    card = found["card"]
    assert card["copies"] == 200_000 * 64 * 4
    assert 0.7 * card["total"] < found["anonymous"] < 1.1 * card["total"]


def changed_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the graph in an onnx folder, and its record in model.json."""
    path = folder / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    change(graph)
    record(folder, graph.SerializeToString())


def record(folder: Path, graph: bytes) -> None:
    (folder / "model.onnx").write_bytes(graph)
    found = {"bytes": len(graph), "sha256": hashlib.sha256(graph).hexdigest()}
    edit(folder / "model.json", "files", "model.onnx", value=found)


def half_logits(graph: onnx.ModelProto) -> None:
    (logits,) = (value for value in graph.graph.output if value.name == "logits")
    logits.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def fewer_logits(graph: onnx.ModelProto) -> None:
    (logits,) = (value for value in graph.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[2].dim_value = 511


def double_cache(graph: onnx.ModelProto) -> None:
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name.endswith("0.key"):
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def one_more_input(graph: onnx.ModelProto) -> None:
    graph.graph.input.add().CopyFrom(graph.graph.input[0])
    graph.graph.input[-1].name = "more"


def no_logits(graph: onnx.ModelProto) -> None:
    del graph.graph.output[0]


def other_present(graph: onnx.ModelProto) -> None:
    graph.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "logits": (half_logits, "got output logits of type 10, expected type 1 of ONNX"),
    "vocab": (
        fewer_logits,
        "got logits of 511 numbers for a token, expected 512 as in model.json",
    ),
    "double": (
        double_cache,
        "got an input past_key_values.0.key of type 11 of ONNX, expected floats of 16 or 32 bits, or "
        "bytes",
    ),
    "input": (one_more_input, "got input more, expected a decoder's"),
    "output": (no_logits, "got no output logits, expected a decoder's"),
    "cache": (other_present, "got output present.0.key of type 1, expected type 10 of ONNX"),
}


@pytest.mark.parametrize("change, problem", GRAPHS.values(), ids=GRAPHS.keys())
def test_graphs_that_are_no_decoders(
    alone: Path,
    refused: Callable[..., str],
    change: Callable[[onnx.ModelProto], None],
    problem: str,
) -> None:
    changed_graph(alone, change)
    assert refused(alone) == (
        f"{alone}/model.onnx: {problem}. The file is damaged or changed: export the model again."
    )


def test_files_that_are_no_graphs(alone: Path, refused: Callable[..., str]) -> None:
    whole = (alone / "model.onnx").read_bytes()
    wrong = [
        b"",
        b"\xff" * 30,
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x3b",
        whole[:-9],
    ]
    for graph in wrong:
        record(alone, graph)
        assert refused(alone) == (
            f"{alone}/model.onnx: got a damaged file, expected an ONNX model. The file is damaged or "
            f"changed: export the model again."
        )


def test_libraries(artifact: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused(artifact, onnxruntime=str(tmp_path)) == (
        f"onnxruntime: got {tmp_path}, expected libonnxruntime.so or a folder that has it. Name the "
        f"right one."
    )
    (tmp_path / "libonnxruntime.so.2.bak").write_text("an older one")
    text = tmp_path / "libonnxruntime.so.1"
    text.write_text("no library")
    message = refused(artifact, onnxruntime=str(tmp_path))
    assert message.startswith(f'ONNX Runtime: got "{text}: ')
    assert message.endswith(
        "\", expected a library to open. Install it (pip install onnxruntime, or your system's "
        "package) and name libonnxruntime.so in the options or in ANYBIT_ONNXRUNTIME."
    )
    assert refused(artifact, kernels=str(tmp_path)) == (
        f"kernels: got {tmp_path}, expected libanybit_onnxruntime.so or a folder that has it. Name "
        f"the right one."
    )


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "slots": ({"slots": 0}, "slots: got 0, expected 1 to 1024. Give such a number."),
    "capacity": (
        {"capacity": 1},
        "capacity: got 1, expected 0, or 2 to 2147483647. Give such a number.",
    ),
    "chunk": ({"chunk": 0}, "chunk: got 0, expected 1 to 65536. Give such a number."),
    "threads": ({"threads": -1}, "threads: got -1, expected 0 to 4096. Give such a number."),
    "backend": (
        {"backend": "tpu"},
        'backend: got "tpu", expected auto, tensorrt or onnxruntime. Choose one of these.',
    ),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(
    artifact: Path, refused: Callable[..., str], options: dict[str, Any], message: str
) -> None:
    assert refused(artifact, **options) == message
