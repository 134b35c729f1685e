"""What is said of an artifact, of its folders and files, and of any ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from calibration.out.files import write_json
from calibration.out.json_file import read_json
from deploy.__main__ import main
from deploy.inspect import inspect, text
from exporter.__main__ import main as exporter_main
from plugins.errors import InputError
from tests.calibration.formats import written


def test_an_artifact(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(copy)
    assert (found["kind"], found["scheme"], found["family"]) == ("artifact", "w8a8", "llama")
    assert found["sizes"]["num_hidden_layers"] == 2 and found["context"] == 256
    assert len(found["nodes"]) == 8
    assert found["nodes"]["model.layers.0.mlp.down_proj"] == "ABQGemm w8a8 [128, 64]"
    assert "tokenizer.json" in found["tokenizer"] and found["bytes"].keys() == {"quant", "onnx"}
    assert found["proof"] is None
    assert found["run"] == [
        f"python -m deploy generate {copy} --prompt 'Once upon a time'",
        f"python -m deploy prove {copy}",
    ]
    assert main(["inspect", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kind: artifact" and "  8 ABQGemm w8a8" in lines
    assert "cache: 2 heads of 16 in 16 bits, 256 bytes a token" in lines
    assert main(["inspect", str(copy), "--nodes"]) == 0
    assert "  model.layers.0.mlp.down_proj: ABQGemm w8a8 [128, 64]" in capsys.readouterr().out
    assert main(["inspect", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_linears_in_floating_point(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_llama(dtype="float16", num_hidden_layers=1, tie_word_embeddings=False)
    made = written.gptq(source, tmp_path / "model", left_out=("o_proj",))
    words = ["--out", str(tmp_path / "out"), "--offline", "--progress", "none", "--keep"]
    assert exporter_main([str(made.folder), *words, "--until", "onnx"]) == 0
    found = inspect(tmp_path / "out")
    assert len(found["nodes"]) == 3
    assert found["floats"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    assert "\nfloats: model.layers.0.self_attn.o_proj, lm_head\n" in text(found, False)
    assert inspect(tmp_path / "out/quant")["floats"] == found["floats"]


def test_what_the_report_says(copy: Path) -> None:
    manifest = read_json(copy / "manifest.json")
    manifest["stages"]["report"] = {**manifest["stages"]["onnx"], "files": {}}
    write_json(copy / "manifest.json", manifest)
    (copy / "report").mkdir()
    quality = {
        "text": "a text",
        "ppl": 12.0,
        "float_ppl": 11.0,
        "kl": 0.1,
        "top1": 0.9,
        "seqlen": 8,
    }
    report = {"validation": {"ok": False, "first_failure": "got 1"}, "quality": quality}
    write_json(copy / "report" / "report.json", report)
    assert inspect(copy)["proof"] == {
        "ok": False,
        "first_failure": "got 1",
        "page": str(copy / "report" / "index.html"),
        "text": "a text",
        "ppl": 12.0,
        "float_ppl": 11.0,
        "kl": 0.1,
        "top1": 0.9,
    }
    assert (
        "proof: failed, got 1; perplexity 12.00 on a text, the float model's 11.00; KL 0.100 nats, same "
        f"next token 90%; {copy / 'report' / 'index.html'}\n"
    ) in text(inspect(copy), False)


def test_folders_and_files_of_it(engine_record: Callable[..., Path]) -> None:
    out = engine_record()
    kinds = {
        "quant": "quant folder",
        "onnx": "onnx folder",
        "onnx/model.onnx": "onnx folder",
        "onnx/model.json": "onnx folder",
        "engine": "engine folder",
        "engine/model.engine": "engine folder",
        "manifest.json": "artifact",
    }
    assert {name: inspect(out / name)["kind"] for name in kinds} == kinds
    quant, engine = inspect(out / "quant"), inspect(out / "engine")
    assert set(quant["nodes"].values()) == {"ABQGemm w8a8"}
    assert quant["run"][0].endswith(" --runner torch --prompt 'Once upon a time'")
    assert engine["engine"] == {
        "edition": "tensorrt-rtx 1.7.1.116",
        "compute_capabilities": [],
        "plugin_layers": 8,
        "max_batch": 2,
        "max_tokens": 64,
        "max_context": 64,
    }
    assert inspect(out)["run"][-1] == f"python -m deploy trtexec {out}"
    assert text(engine, False).splitlines()[-5] == (
        "engine: tensorrt-rtx 1.7.1.116, 8 plugin layers, at most 2 sequences, 64 tokens at once, 64 in all"
    )


def test_any_onnx_file(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [info("y", onnx.TensorProto.FLOAT, ["N", 3])],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "some.onnx")
    assert inspect(tmp_path / "some.onnx") == {
        "kind": "ONNX file",
        "opset": 21,
        "inputs": ["x float[N, 3]"],
        "outputs": ["y float[N, 3]"],
        "ops": {"Relu": 1},
        "weights": 0,
        "nodes": {},
        "floats": [],
    }


def test_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff no protobuf")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError) as error:
        inspect(tmp_path / "bad.onnx")
    assert str(error.value).startswith(f"{tmp_path / 'bad.onnx'}: got a file that is not ONNX (")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError) as error:
            inspect(path)
        assert str(error.value) == (
            f"{path}: got neither an artifact nor an ONNX file, expected an OUT folder, its quant, "
            "onnx or engine folder, a pack, or FILE.onnx. Check the path."
        )
    with pytest.raises(InputError) as error:
        inspect(tmp_path / "none")
    assert "got no such folder, expected an artifact folder" in str(error.value)
