"""Two artifacts side by side: what differs is found in its section, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.out.files import write_json
from deploy.__main__ import main
from deploy.diff import SECTIONS, Difference, differences, text
from exporter.__main__ import main as exporter_main
from plugins.errors import InputError
from tests.calibration.formats import written
from tests.exporter.planted import change_graph, change_tensor


def differing(first: Path, second: Path) -> list[str]:
    return [name for name, items in differences(first, second).items() if items]


def test_a_copy_is_the_same(artifact: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = [name for name in SECTIONS if name not in ("layers", "quality")]
    assert main(["diff", str(artifact), str(copy), "--same", ",".join(there)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"{name}: same" for name in there),
        "layers: not there",
        "quality: not there",
    ]


def test_weights_in_other_coordinates_are_not_compared(
    artifact: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "quant" / "quant.json"
    meta = json.loads(path.read_text())
    settings = {"effort": "fast", "calib": "default", "seed": 3}
    settings["switches"] = {"rotation": "hadamard"}
    write_json(path, meta | {"calibration": {"settings": settings}})
    assert main(["diff", str(artifact), str(copy)]) == 0
    assert (
        "weights: 1 difference\n"
        "  all, in other coordinates and not compared: not rotated | rotated (hadamard, seed 3)\n"
        "sizes: same\n"
    ) in capsys.readouterr().out
    assert main(["diff", str(artifact), str(copy), "--same", "weights"]) == 3


def test_what_was_not_compared_is_not_the_same(
    artifact: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither has a report."""
    assert (
        main(
            [
                "diff",
                str(artifact),
                str(copy),
                "--same",
                "graph,layers,quality",
                "--progress",
                "none",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(
        "--same graph,layers,quality: got no layers and no quality in either artifact, expected a "
        "report that has them. Leave them out, or make the reports: python -m exporter "
    )
    assert main(["diff", str(artifact), str(copy), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["layers"] is None and plain["graph"] == []


def test_weights_of_the_onnx_file_alone(
    artifact: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.self_attn.o_proj.scale"

    def change(array: np.ndarray) -> None:
        array[3] += 0.5

    change_tensor(copy, name, change)
    assert differing(artifact, copy) == ["weights"]
    assert (
        main(["diff", str(artifact), str(copy), "--same", "graph,weights", "--progress", "none"])
        == 3
    )
    out, err = capsys.readouterr()
    assert f"weights: 1 difference\n  onnx {name}: float32[64, 1] | differs by at most 0.5\n" in out
    assert err == (
        f"{artifact} and {copy}: got other weights (first: onnx {name}, float32[64, 1] and differs by "
        "at most 0.5), expected the same. --lines 0 shows all that differs.\n"
    )
    assert main(["diff", str(artifact), str(copy), "--same", "graph"]) == 0


def test_a_changed_graph(artifact: Path, copy: Path) -> None:
    node = "model.layers.0.mlp.down_proj"

    def change(model: onnx.ModelProto) -> None:
        found = next(item for item in model.graph.node if item.name == node)
        found.attribute.append(onnx.helper.make_attribute("extra", 7))
        model.graph.node.append(onnx.helper.make_node("Identity", ["input_ids"], ["x"], "more"))

    change_graph(copy, change)
    changed, added = differences(artifact, copy)["graph"]
    assert changed.name == f"node {node}" and "extra = 7" in changed.second
    assert (added.name, added.first) == ("node more", "nothing")
    assert added.second == "Identity(input_ids) -> x {}"


def test_other_bits_differ_in_all_that_depends_on_them(
    artifact: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from calibration.progress import NullProgress
    from calibration.quant.bits import Rule, SchemeMap
    from calibration.quant.scheme import QuantScheme
    from exporter.pipeline import ExportRequest, run_pipeline

    rules = (Rule("layers.1.mlp.down_proj", "w4a8"),)
    schemes = SchemeMap(QuantScheme("ABQGemm", "rtn", 8, 8), rules)
    other = tmp_path / "other"
    request = ExportRequest(
        model=str(tiny_model_dir), schemes=schemes, out=other, until="onnx", offline=True
    )
    run_pipeline(request, NullProgress())
    found = differences(artifact, other)
    assert [name for name, items in found.items() if items] == [
        "settings",
        "graph",
        "weights",
        "sizes",
    ]
    linear = found["weights"][0]
    assert linear.name == "model.layers.1.mlp.down_proj"
    assert linear.first.startswith("w8a8, at most ")
    assert linear.second.startswith("w4a8, differs by at most ")
    assert {item.name for item in found["sizes"]} >= {"bits_per_weight", "model_quant_bytes"}


def test_a_linear_in_floating_point(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_llama(dtype="float16", num_hidden_layers=1)
    for name, left_out in (("codes", ()), ("floats", ("o_proj",))):
        made = written.gptq(source, tmp_path / f"{name}-model", left_out=left_out).folder
        words = ["--out", str(tmp_path / name), "--offline", "--progress", "none", "--keep"]
        assert exporter_main([str(made), *words, "--until", "onnx"]) == 0
    found = differences(tmp_path / "codes", tmp_path / "floats")["weights"]
    (changed,) = (item for item in found if item.name == "model.layers.0.self_attn.o_proj")
    assert (changed.first, changed.second) == ("a linear", "a linear in float16")


def test_reports_side_by_side(
    artifact: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"level": "export", "phase": "prefill", "tensor": "logits", "relative": 0.0123}
    (copy / "report").mkdir()
    report = {"validation": {"rows": [row]}, "quality": {"kl": 0.5}, "perplexity": None}
    write_json(copy / "report" / "report.json", report)
    found = differences(artifact, copy)
    assert [name for name, items in found.items() if items] == ["layers", "quality"]
    assert text(found, 0).splitlines()[-4:] == [
        "layers: 1 difference",
        "  export prefill logits: nothing | 0.0123",
        "quality: 1 difference",
        "  kl: nothing | 0.5",
    ]
    assert main(["diff", str(artifact), str(copy), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["quality"] == [{"name": "kl", "first": "nothing", "second": "0.5"}]


def test_long_lists_are_cut() -> None:
    items = [Difference(str(number), "a\x1b", "b" * 400) for number in range(5)]
    lines = text({"graph": items}, 2).splitlines()
    assert lines[0] == "graph: 5 differences" and lines[-1] == "  and 3 more" and len(lines) == 4
    assert lines[1].startswith("  0: a\\x1b | bbb") and len(lines[1]) < 200


def test_what_is_the_same_in_several_layers_is_one_line() -> None:
    items = [Difference(f"input past.{layer}.key", "a", "b") for layer in (0, 1, 2, 4)]
    items += [Difference("input past.3.key", "a", "c"), Difference("input ids", "a", "b")]
    assert text({"graph": items}, 2).splitlines() == [
        "graph: 6 differences",
        "  input past.{0..2,4}.key: a | b",
        "  input past.3.key: a | c",
        "  and 1 more",
    ]
    assert len(text({"graph": items}, 0).splitlines()) == 7


def test_what_it_needs(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as error:
        differences(artifact, artifact / "onnx")
    assert str(error.value) == (
        f"{artifact / 'onnx'}: got onnx, expected an artifact with quant and onnx. Give the whole "
        "OUT folder."
    )
    with pytest.raises(SystemExit) as stop:
        main(["diff", "a", "b", "--same", "weights,names"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m deploy diff: error: argument --same: got 'names', expected some of "
        "settings,graph,weights,sizes,layers,quality, separated by commas"
    )
