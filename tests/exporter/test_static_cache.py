"""--kv static:CAPACITY: the graph, model.json, every command and the proof of a cache of fixed size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.out.description import read_description
from calibration.quant.folder import read_quant
from deploy.__main__ import main as deploy
from exporter.graph.decoder import export_onnx
from exporter.proof.options import ValidateOptions
from exporter.proof.validate import validate
from exporter.run.model import find_model
from plugins.cached_attention import OP
from plugins.errors import InputError
from tests.exporter.engine_cases import ENGINE
from tests.exporter.graph_cases import Decoder

Export = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
Refused = Callable[[tuple[int, str, str], str], None]
BRIEF = ValidateOptions(tokens=12, steps=2)


def test_the_graph(tiny_export: Export) -> None:
    path = tiny_export(static=48) / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [item.version for item in model.opset_import if not item.domain] == [24]
    assert {function.opset_import[0].version for function in model.functions} == {24}

    def shapes(values: Any) -> dict[str, list[int | str]]:
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values
        }

    caches = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert shapes(model.graph.input) == {
        "input_ids": ["B", "S"],
        "write_indices": ["B"],
        "logits_indices": ["B", "L"],
        **{f"past_key_values.{name}": ["B", 2, 48, 16] for name in caches},
    }
    assert shapes(model.graph.output) == {
        "logits": ["B", "L", 512],
        **{f"present.{name}": ["B", 2, 48, 16] for name in caches},
    }
    nodes = [node for node in model.graph.node if node.op_type == OP]
    assert [node.input[-1] for node in nodes] == ["write_indices"] * 2
    tables = {one.name: list(one.dims) for one in model.graph.initializer}
    assert tables["rope.cos"] == [48, 8]


def test_rows_of_other_lengths_share_a_call(tiny_export: Export) -> None:
    """What a C++ program does: rows of one buffer, each with as many tokens as it has, padded on the
    right by anything.
    """
    decoder = Decoder(tiny_export(static=24, dtype="float32") / "onnx")
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 512, length) for length in (9, 3, 12)]
    past: dict[str, np.ndarray] = {}

    def call(pieces: list[np.ndarray], filled: list[int]) -> list[np.ndarray]:
        nonlocal past
        width = max(map(len, pieces))
        ids = np.stack([np.resize(np.append(piece, 7), width) for piece in pieces])
        feeds = {
            "input_ids": ids,
            "write_indices": np.array(filled, np.int64),
            "logits_indices": np.tile(np.arange(width), (len(ids), 1)),
            **past,
        }
        logits, past = decoder(feeds)
        return [row[: len(piece)] for row, piece in zip(logits, pieces, strict=True)]

    def empty(batch: int) -> dict[str, np.ndarray]:
        return {value.name: np.zeros((batch, 2, 24, 16), np.float32) for value in decoder.caches}

    want = []
    for text in texts:
        past = empty(1)
        want.append(call([text], [0])[0])
    past = empty(3)
    first, second = (
        [4, 1, 6],
        [[text[:n], text[n:]] for text, n in zip(texts, [4, 1, 6], strict=True)],
    )
    got = call([pair[0] for pair in second], [0, 0, 0])
    more = call([pair[1] for pair in second], first)
    for parts in zip(got, more, want, strict=True):
        np.testing.assert_allclose(np.concatenate(parts[:2]), parts[2], atol=1e-4)


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"kv_bits": 4, "dtype": "bfloat16"}])
def test_its_proof(tiny_export: Export, fields: dict[str, Any]) -> None:
    result = validate(tiny_export(static=48, **fields), BRIEF)
    assert result.ok, result.first_failure
    phases = {row.phase for row in result.rows if row.level == "export"}
    assert phases == {"prefill", "decode", "padded batch"}


def looks_ahead(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.output[0] == "mask").op_type = "GreaterOrEqual"


def writes_elsewhere(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == OP]
    nodes[1].input[3] = nodes[0].input[3]


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (looks_ahead, "model.layers.0.self_attn.context"),
        (writes_elsewhere, "model.layers.1.self_attn.context"),
    ],
)
def test_a_fault_is_found(
    tiny_export: Export, tmp_path: Path, plant: Callable[[onnx.ModelProto], None], where: str
) -> None:
    out = shutil.copytree(tiny_export(static=48), tmp_path / "out")
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    plant(model)
    path.write_bytes(model.SerializeToString())
    failure = validate(out, BRIEF).first_failure
    assert f" at {where} given its inputs (export, " in failure, failure


def test_a_larger_one_has_the_same_weights(tiny_export: Export, tmp_path: Path) -> None:
    quant = read_quant(tiny_export(static=48) / "quant")
    for size in (16, 32):
        folder = tmp_path / str(size)
        folder.mkdir()
        facts = export_onnx(quant, folder, max_context=size, static=True)
        assert facts == {"summary": "8 ABQGemm nodes, opset 24", "custom_nodes": 8}
    small, large = ((tmp_path / size / "model.onnx.data").stat().st_size for size in ("16", "32"))
    assert large - small == 2 * 16 * 8 * 2  # rows of rope.cos and rope.sin


# ---------------------------------------------------------------- the command line


def test_from_the_export_to_a_text(
    run: Run, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run(out, "--kv", "static:32")
    assert code == 0 and "opset 24" in stdout
    description, _ = read_description(out / "onnx" / "model.json", "")
    cache = description.cache
    assert (description.max_context, cache.form, cache.capacity) == (32, "static", 32)
    texts = []
    for runner in ("native", "onnxruntime"):
        options = ["--prompt", "The tower", "--runner", runner, "--max-new-tokens", "99"]
        assert deploy(["generate", str(out), *options]) == 0
        texts.append(capsys.readouterr())
        assert "The context of 32 tokens is full" in texts[-1].err
    code, _, err = run(out, "--resume")
    assert code == 0 and "quant: kept, nothing changed\n" in err and "onnx: kept" not in err
    cache = read_description(out / "onnx" / "model.json", "")[0].cache
    assert (cache.form, cache.capacity) == ("concat", None)
    refused(
        run(tmp_path / "other", "--kv", "static:300"),
        "--kv: got a capacity of 300 tokens, expected at most 256, the context that the model was "
        "made for. Give --kv static:256 or less.",
    )
    refused(
        run(tmp_path / "other", "--kv", "static:32", "--max-seq", "64"),
        "--max-seq: got 64, expected 32, the capacity that --kv gives. Leave it out: a sequence has "
        "as many tokens as the cache has room for.",
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("form", ["static", "static:", "static:1", "static:x", "paged", "concat:4"])
def test_forms_that_do_not_exist(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    from exporter.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([str(tiny_model_dir), "--wbits", "4", "--abits", "8", "--kv", form])
    assert ended.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"argument --kv: got {form!r}, expected concat or static:CAPACITY, such as static:2048"
        )
    )


def test_its_engine_is_for_programs(
    tiny_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(tiny_export(static=16), tmp_path / "out")
    profiles = [
        profile | {"inputs": profile["inputs"] | {"write_indices": {"max": [1]}}}
        for profile in ENGINE["profiles"]
    ]
    monkeypatch.setattr("exporter.run.tensorrt.gpu_capabilities", lambda: ["8.9"])
    monkeypatch.setattr("exporter.run.tensorrt.check_engine", lambda _: {"profiles": profiles})
    shutil.copytree(out / "onnx", out / "engine")
    (out / "engine" / "engine.json").write_text(json.dumps(ENGINE | {"profiles": profiles}))
    manifest = json.loads((out / "manifest.json").read_text())
    from calibration.out.files import file_records

    records = file_records(out / "engine")
    manifest["stages"]["engine"] = manifest["stages"]["onnx"] | {"files": records}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError) as caught:
        find_model(out, "tensorrt")
    assert str(caught.value) == (
        "--runner tensorrt: got an engine with a static cache, expected one whose cache grows. Run "
        "it in a C++ program (docs/cpp_service.md), or export with --kv concat."
    )
    monkeypatch.setattr("exporter.proof.engine_levels.find_runner", lambda _: Gpu())
    notes = validate(out, ValidateOptions(tokens=4, steps=0)).notes
    assert (
        "The engine has a static cache, which the validation cannot run, so the CUDA kernels were "
        "not executed in it."
    ) in notes


class Gpu:
    """As if there were one."""

    def unavailable(self) -> None:
        """It is."""
