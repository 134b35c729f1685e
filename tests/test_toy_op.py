"""An op of another package, which nothing here knows by name: a folder with op.py and an entry
point takes it from a float model to a proven ONNX file.
"""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import plugins
from calibration import formats
from calibration.methods.rtn import quantize
from calibration.out.fingerprint import code_digest
from calibration.out.json_file import read_json
from calibration.quant.bits import Rule
from calibration.quant.folder import fuse, read_quant
from calibration.quant.scheme import QuantLinear, QuantScheme
from calibration.quant.sizes import linear_specs, stored_bits
from calibration.solvers.gptq import factored, gptq, quadratic_error
from calibration.solvers.grid import search_grid
from exporter.__main__ import main
from exporter.proof.memory import Calls, memory_needed
from plugins import extension_files, library_ops, op_names, op_spec, ranked_ops
from plugins.core.op_spec import OpSpec, QuantArrays, is_custom
from plugins.errors import InputError
from tests.tracked import REPOSITORY, tracked_files

TOY = QuantScheme("ToyGemm", "rtn", 3, 8, group_size=16, act_symmetric=True)
ENTRY = "[anybit.ops]\ntoy = {}\n"


def _installed(folder: Path, entry: str) -> Path:
    package, info = folder / "toy_package", folder / "toy_package-1.0.dist-info"
    shutil.copytree(
        REPOSITORY / "tests" / "toy_package", package, ignore=lambda *_: ["__pycache__"]
    )
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY.format(entry))
    return folder


def _forget() -> None:
    plugins._extensions.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_package"]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """install(entry) -> a folder on sys.path with the package."""

    def make(entry: str) -> Path:
        folder = tmp_path / "site"
        folder.mkdir()
        monkeypatch.syspath_prepend(_installed(folder, entry))
        _forget()
        return folder

    yield make
    monkeypatch.undo()
    _forget()


@pytest.fixture
def toy(install: Callable[[str], Path]) -> OpSpec:
    """The op, installed."""
    install("toy_package.op:SPEC")
    return op_spec("ToyGemm")


def _weight(rows: int = 24) -> np.ndarray:
    weight = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32) ** 3
    weight[3] = 0
    return weight


def test_the_registry_finds_it_and_forgets_it(toy: OpSpec) -> None:
    assert op_names() == ["ABQGemm", "QQQGemm", "ToyGemm"]
    assert [op.name for op in ranked_ops()] == ["QQQGemm", "ToyGemm", "ABQGemm"]
    assert library_ops() == ["ABQGemm", "QQQGemm"]  # it has no plugin in our library
    assert isinstance(toy, OpSpec) and [path.name for path in extension_files()] == ["op.py"]


def test_without_it_nothing_knows_it() -> None:
    assert op_names() == library_ops() and extension_files() == []
    with pytest.raises(InputError) as caught:
        op_spec("ToyGemm")
    assert str(caught.value) == (
        "custom op 'ToyGemm': unknown, expected one of ABQGemm, QQQGemm. Check the spelling."
    )


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("toy_package.nothing:SPEC", "No module named 'toy_package.nothing', expected an OpSpec"),
        ("toy_package.op:ToyGemm", "ABCMeta, expected an OpSpec"),
        ("plugins.qqq_gemm.op:SPEC", "a second op QQQGemm, expected a new name"),
    ],
)
def test_a_broken_package_is_named(
    install: Callable[[str], Path], entry: str, problem: str
) -> None:
    install(entry)
    with pytest.raises(InputError) as caught:
        op_spec("ABQGemm")
    assert str(caught.value) == (
        f"custom op toy = {entry}: got {problem}. Mend or uninstall its package."
    )


def test_its_code_is_part_of_what_results_depend_on(install: Callable[[str], Path]) -> None:
    before = code_digest("plugins/*.py")
    file = install("toy_package.op:SPEC") / "toy_package" / "op.py"
    with_it = code_digest("plugins/*.py")
    file.write_text(file.read_text() + "# changed\n")
    assert len({before, with_it, code_digest("plugins/*.py")}) == 3


def test_bits_choose_it(toy: OpSpec) -> None:
    base = QuantScheme("ABQGemm", "rtn", 4, 8, group_size=16, act_symmetric=True)
    kept = Rule("*", "w3a8").scheme(base)
    assert kept.op == "ABQGemm"  # the base's op where that takes the bits
    other = Rule("*", "w4a8-g0").scheme(TOY)
    assert (other.op, other.act_symmetric) == ("QQQGemm", True)
    assert Rule("*", "w3a8").scheme(replace(base, op="QQQGemm")).op == "ToyGemm"
    assert Rule("*", "w3a8").scheme(TOY) == TOY


def test_sizes_come_from_its_arrays(toy: OpSpec) -> None:
    specs = list(linear_specs("a.b", (24, 64), True, TOY))
    assert [(spec.name, str(spec.dtype), spec.shape) for spec in specs] == [
        ("a.b.codes", "int8", (24, 64)),
        ("a.b.scale", "float32", (24, 1)),
        ("a.b.power", "int8", (24, 4)),
        ("a.b.bias", "float32", (24,)),
    ]
    assert stored_bits((24, 64), True, TOY) == 24 * (64 * 3 + 32 + 4 * 8 + 32)


def test_memory_and_formats_ask_it(
    toy: OpSpec, tiny_quant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = read_quant(tiny_quant() / "quant")
    own = {node: quant.scheme_of(node) for node in quant.decoder.nodes}
    known, other = (
        memory_needed(quant.decoder, schemes, Calls.within(2048).tokens).whole
        for schemes in (own, dict.fromkeys(own, TOY))
    )
    per_weight = op_spec(quant.scheme.op).unpacked_bytes(quant.scheme.gemm)
    assert other - known == (24 - per_weight) * quant.sizes["linear_weights"]
    monkeypatch.setattr(type(toy), "objection", lambda *_: None)
    with pytest.raises(InputError) as caught:
        formats.check("compressed-tensors", replace(TOY, wbits=4))
    assert str(caught.value) == (
        "--format compressed-tensors: got the op ToyGemm, expected one whose weights are scale * "
        "(code - zero point). Use other bits or groups, or leave out --format."
    )


def test_plain_rounding_is_on_its_grid_and_within_its_bound(toy: OpSpec) -> None:
    weight = _weight()
    arrays = quantize(weight, np.arange(24.0), TOY)
    assert set(arrays.named()) == {"codes", "scale", "power", "bias"}
    linear = QuantLinear("x", TOY, arrays)
    error = np.abs(linear.dequantize() - weight)
    assert (error <= toy.rounding_bound(weight, TOY.gemm) * 1.01).all() and error.max() > 0
    group = torch.arange(64) // 16
    grid = toy.grid_from_arrays(arrays, TOY.gemm)
    values = grid.values(torch.from_numpy(arrays.codes).float(), group)
    np.testing.assert_array_equal(values.numpy(), linear.dequantize())


def test_gptq_rounds_on_its_grid(toy: OpSpec) -> None:
    weight, group = torch.from_numpy(_weight()), torch.arange(64) // 16
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1:] += x[:, :-1]
    hessian = x.T @ x
    plain, grid = search_grid(weight, TOY, steps=1), search_grid(weight, TOY)
    rounded, found = (
        gptq(weight, factored(hessian, 0.01, True), one, group) for one in (plain, grid)
    )
    assert quadratic_error(weight, found.values, hessian) < quadratic_error(
        weight, rounded.values, hessian
    )
    refitted = grid.refitted(weight, found.codes, hessian)
    for one, codes in ((grid, found.codes), (refitted, found.codes)):
        linear = QuantLinear("x", TOY, one.arrays(codes, None))
        assert np.array_equal(one.values(codes, group).numpy(), linear.dequantize())
    assert torch.equal(found.values, grid.values(found.codes, group))


def test_its_arrays_are_stacked_and_cut(toy: OpSpec) -> None:
    arrays = quantize(_weight(), None, TOY)
    parts = [arrays.rows(slice(0, 8)), arrays.rows(slice(8, 24))]
    assert [part.more["power"].shape for part in parts] == [(8, 4), (16, 4)]
    fused = fuse([QuantLinear("x", TOY, part) for part in parts], "both").arrays
    for one in (fused, QuantArrays.of(arrays.named())):
        assert one.named().keys() == arrays.named().keys()
        assert all(np.array_equal(one.named()[name], arrays.named()[name]) for name in one.named())


def test_nothing_outside_its_folder_names_an_op() -> None:
    """Neither `scheme.op == ...` nor the name of an op in any module but the op's own."""
    sources = [path for path in tracked_files() if path.suffix == ".py"]
    folders = {path.parent for path in sources if path.match("plugins/*/op.py")}
    packages = {REPOSITORY / name for name in ("plugins", "calibration", "exporter", "deploy")}
    found = []
    for path in sources:
        if packages & {*path.parents} and not folders & {*path.parents}:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Constant) and node.value in library_ops()
                equal = isinstance(node, ast.Compare) and any(
                    isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops
                )
                sides = [node.left, *node.comparators] if equal else []
                compared = any(
                    isinstance(side, ast.Attribute) and side.attr == "op" for side in sides
                )
                if named or compared:
                    found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert len(folders) == len(library_ops()) and not found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "auto"])
def test_from_a_float_model_to_a_proven_onnx_file(
    toy: OpSpec, tiny_llama: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """The command chooses the op by the bits and, with auto, its method; every comparison of the
    report is within its limits.
    """
    out = tmp_path / "out"
    model = tiny_llama(attention_bias=True)
    line = (
        f"{model} --wbits 3 --abits 8 --group-size 16 --method {method} --engine none "
        f"--head-bits 16 --nsamples 4 --seqlen 32 --offline --progress none --out {out}"
    )
    assert main(line.split()) == 0
    quant = read_quant(out / "quant")
    assert (quant.scheme.op, quant.scheme.method) == (
        "ToyGemm",
        "qqq" if method == "auto" else method,
    )
    assert quant.has("model.layers.0.self_attn.q_proj.power")
    assert quant.sizes["bits_per_weight"] == pytest.approx(3 + 8 / 16 + 32 / 64, abs=0.3)
    report = read_json(out / "report" / "report.json")
    assert report["scheme"]["op"] == "ToyGemm" and report["validation"]["ok"] is True
    model = onnx.load(str(out / "onnx" / "model.onnx"), load_external_data=False)
    nodes = [node for node in model.graph.node if is_custom(node.domain)]
    assert {node.op_type for node in nodes} == {"ToyGemm"} and len(nodes) == 2 * 4
    powers = quant.tensor("model.layers.0.self_attn.q_proj.power")
    assert (np.unique(powers).size > 1) == (method == "auto")  # plain rounding has one
