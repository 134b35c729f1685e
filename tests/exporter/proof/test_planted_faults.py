"""Ten faults, planted in an artifact whose checksums fit them where a fault could have got past
them: the proof finds each and names it, and docs/proof.md has the very table of what it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.out.files import sha256_file, write_json
from calibration.out.json_file import read_json
from calibration.progress import NullProgress
from deploy.prove import prove_artifact
from exporter.proof.options import ValidateOptions
from plugins.errors import UserError
from tests.exporter.engine_cases import ENGINE
from tests.exporter.planted import change_graph, change_tensor, copy_of, renew_records

PAGE = Path(__file__).resolve().parents[3] / "docs" / "proof.md"
BRIEF = ValidateOptions(tokens=16, steps=0)
Fault = Callable[[Path], None]


def scale_of_one_node(out: Path) -> None:
    def change(scale: np.ndarray) -> None:
        scale[7] *= 1.5

    change_tensor(out, "model.layers.1.self_attn.o_proj.scale", change)


def zero_point(out: Path) -> None:
    def change(zero: np.ndarray) -> None:
        zero[5] += 1

    change_tensor(out, "model.layers.0.mlp.down_proj.zero", change)


def two_rows_swapped(out: Path) -> None:
    def change(planes: np.ndarray) -> None:  # [bits, rows, words]
        planes[:, [3, 9]] = planes[:, [9, 3]]

    change_tensor(out, "model.layers.1.mlp.gate_up_proj.weight", change)


def rope_base(out: Path) -> None:
    """Angles to another base: position * base^(-2 i / d) with base 20000 for 10000."""
    for name, function in (("rope.cos", np.cos), ("rope.sin", np.sin)):

        def change(table: np.ndarray, function: np.ufunc = function) -> None:
            positions, frequencies = (np.arange(size) for size in table.shape)
            angles = positions[:, None] * 20000.0 ** (-frequencies / table.shape[1])
            table[:] = function(angles)

        change_tensor(out, name, change)


def one_kv_head(out: Path) -> None:
    """Every head of layer 1's values is the first."""

    def change(model: onnx.ModelProto) -> None:
        name = "present.1.value"
        maker = next(node for node in model.graph.node if name in node.output)
        place = list(model.graph.node).index(maker)
        maker.output[list(maker.output).index(name)] = "every.head"
        heads = onnx.numpy_helper.from_array(np.zeros(2, np.int64), "first.head")
        model.graph.initializer.append(heads)
        gather = onnx.helper.make_node("Gather", ["every.head", "first.head"], [name], axis=1)
        model.graph.node.insert(place + 1, gather)

    change_graph(out, change)


def norm_epsilon(out: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == "model.layers.1.mlp.gate_up_proj")
        next(item for item in node.attribute if item.name == "norm_epsilon").f = 0.1

    change_graph(out, change)


def tokenizer_of_another_model(out: Path) -> None:
    for stage in ("quant", "onnx"):
        path = out / stage / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        words = tokenizer["model"]["vocab"]
        words["e"], words["t"] = words["t"], words["e"]
        path.write_text(json.dumps(tokenizer))
    renew_records(out)


def stale_engine(out: Path) -> None:
    with_engine(out)
    change_graph(out, lambda model: model.metadata_props.add(key="made", value="later"))


def truncated_data_file(out: Path) -> None:
    path = out / "onnx" / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4096])


def plugin_of_another_build(out: Path) -> None:
    with_engine(out)
    (out / "engine" / "libanybit_plugins.so").write_bytes(b"another build")
    renew_records(out)


def with_engine(out: Path) -> None:
    """An engine folder whose files belong to each other; its engine file is none."""
    folder = out / "engine"
    folder.mkdir()
    (folder / "model.engine").write_bytes(b"an engine")
    library = folder / "libanybit_plugins.so"
    library.write_bytes(b"a library")
    for path in (out / "onnx").iterdir():
        if path.suffix != ".data" and path.name != "model.onnx":
            (folder / path.name).write_bytes(path.read_bytes())
    names = ("model.onnx", "model.onnx.data")
    record = ENGINE | {
        "plugin_library": {"name": library.name, "sha256": sha256_file(library)},
        "source": {name: sha256_file(out / "onnx" / name) for name in names},
    }
    write_json(folder / "engine.json", record)
    manifest = read_json(out / "manifest.json")
    manifest["stages"]["engine"] = {**manifest["stages"]["onnx"], "files": {}}
    write_json(out / "manifest.json", manifest)
    renew_records(out)


FAULTS: tuple[Fault, ...] = (
    scale_of_one_node,
    zero_point,
    two_rows_swapped,
    rope_base,
    one_kv_head,
    norm_epsilon,
    tokenizer_of_another_model,
    stale_engine,
    truncated_data_file,
    plugin_of_another_build,
)


def told(out: Path) -> tuple[str, str, str]:
    """(found by, node or file, kind) as the proof says it, without numbers."""
    try:
        result = prove_artifact(out, BRIEF, None, NullProgress())
    except UserError as error:
        where = error.where.replace(f"{out}/", "")
        kind = re.split(r", expected| \(|, built", error.problem.removeprefix("got "))[0]
        return "tokenizer" if "tokenizer" in where else "files", where, _plain(kind)
    found = re.search(r" at (\S+)(?: \(with \S+\))? given its inputs \((\w+)", result.first_failure)
    assert found, result.first_failure
    node, level = found.groups()
    cause = result.facts["causes"][0]
    assert cause.startswith(node)
    return level, node, cause.removeprefix(node).lstrip(",: ").partition(":")[0]


def _plain(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "n", text)


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_the_proof_names_it(tiny_export: Callable[..., Path], tmp_path: Path, plant: Fault) -> None:
    out = copy_of(tiny_export(wbits=8), tmp_path / "out")
    plant(out)
    level, where, kind = told(out)
    name = plant.__name__.replace("_", " ")
    row = f"| {name} | {level} | `{where}` | {kind} |"
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert row in rows, row


def test_the_table_has_no_other_row() -> None:
    rows = PAGE.read_text(encoding="utf-8").partition("| fault |")[2].splitlines()[2:]
    table = [row.split("|")[1].strip() for row in rows[: rows.index("")]]
    assert table == [plant.__name__.replace("_", " ") for plant in FAULTS]


def test_without_a_fault_it_passes(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    """The same preparations, and nothing wrong."""
    out = copy_of(tiny_export(wbits=8), tmp_path / "out")
    with_engine(out)
    change_tensor(out, "model.layers.1.self_attn.o_proj.scale", lambda scale: None)
    result = prove_artifact(out, BRIEF, None, NullProgress())
    assert result.ok and "causes" not in result.facts
