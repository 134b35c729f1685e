"""Methods of the user's own: the template of docs/methods.md end to end, and what a file that is
not right is told.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.blocks.rounding import SiteGrid, SiteSolver
from calibration.methods import Method, find_method, method_names
from calibration.quant.folder import read_quant
from calibration.quant.options import QuantizeOptions
from calibration.quant.quantize import quantize_model
from calibration.quant.scheme import QuantScheme
from calibration.settings import CalibrationSettings, MethodSettings
from calibration.solvers.gptq import factored, gptq, quadratic_error
from calibration.solvers.grid import search_grid
from calibration.solvers.hessian import Moments
from plugins import op_names, op_spec
from plugins.errors import InputError
from tests.calibration.block_cases import QQQ, QQQ_GROUPS, W3A6, block_task, calibrate_tiny
from tests.calibration.llama import DOWN, QKV, SITES
from tests.forks import run_command

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TEMPLATE, SWITCHES, DECLARED = BLOCKS
NEAREST = "def round(target, hessian, grid):\n    return grid.round(target)\n"
KEEP = """
import itertools
made, inner = itertools.count(), round
def round(target, hessian, grid):
    codes = inner(target, hessian, grid)
    torch.save(codes, {folder!r} + f"/{{next(made)}}.pt")
    return codes
"""
BITS = {
    "channel": (),
    "groups": ("--group-size", "64"),
    "five levels": ("--wbits", "2b", "--group-size", "16"),
}


def _file(folder: Path, text: str, name: str = "my_method.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def _method(folder: Path, text: str) -> Method:
    return find_method("my_method", _file(folder, text))


# ---------------------------------------------------------------- the template


def test_the_template_is_one_screen() -> None:
    assert TEMPLATE.startswith("# template\n") and TEMPLATE.count("\n") <= 20


@pytest.mark.parametrize("more", BITS.values(), ids=BITS)
def test_the_templates_codes_are_those_of_the_folder(
    tiny_model_dir: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    file = _file(tmp_path, TEMPLATE + KEEP.format(folder=str(tmp_path)))
    out = tmp_path / "out"
    assert calibrate_tiny(tiny_model_dir, out, "--method", str(file), *more) == 0
    quant = read_quant(out / "quant")
    assert quant.scheme.method == "my_method" and quant.calibration["method"]["file"] == file.name
    assert quant.calibration["settings"]["switches"]["rotation"] == "hadamard"
    for number in range(8):
        codes = torch.load(tmp_path / f"{number}.pt").numpy()
        members = list(SITES.values())[number % 4]
        stored = [
            quant.linear(f"model.layers.{number // 4}.{member}").arrays.codes for member in members
        ]
        np.testing.assert_array_equal(np.concatenate(stored), codes)
    for block in quant.calibration["blocks"]:
        assert block["loss_after"] < 0.95 * block["loss_before"]


def _problem(scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor, SiteGrid]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(12, 128, generator=generator)
    x = torch.randn(400, 32, generator=generator) @ torch.randn(32, 128, generator=generator)
    x = (x + torch.randn(400, 128, generator=generator)).double()
    group = torch.arange(128) // (scheme.group_size or 128)
    return target, x.T @ x, SiteGrid(search_grid(target, scheme), group, generator)


@pytest.mark.parametrize("scheme", [QQQ, QQQ_GROUPS, W3A6], ids=lambda one: f"{one.op}-{one.label}")
def test_the_template_is_gptq(tmp_path: Path, scheme: QuantScheme) -> None:
    target, hessian, grid = _problem(scheme)
    code = _method(tmp_path, TEMPLATE)._code
    codes = code.round(target, hessian, grid)
    wanted = gptq(target, factored(hessian, act_order=False), grid.grid, grid.group).codes
    assert (codes == wanted).float().mean() > 0.99
    errors = [quadratic_error(target, grid.values(one), hessian) for one in (codes, wanted)]
    assert errors[0] < 1.02 * errors[1]
    assert errors[0] < 0.8 * quadratic_error(target, grid.values(grid.round(target)), hessian)


@pytest.mark.parametrize("scheme", [QQQ, QQQ_GROUPS, W3A6], ids=lambda one: f"{one.op}-{one.label}")
def test_a_grid_by_columns_is_the_grid(scheme: QuantScheme) -> None:
    target, _, grid = _problem(scheme)
    codes = grid.round(target)
    values, some = grid.values(codes), torch.tensor([100, 3])
    for k in (0, 63, 64, 127):
        torch.testing.assert_close(grid.round(target[:, k].double(), k), codes[:, k])
        torch.testing.assert_close(grid.values(codes[:, k].long(), k), values[:, k])
    for columns in (slice(20, 90), some):
        assert torch.equal(grid.round(target[:, columns], columns), codes[:, columns])
        assert torch.equal(grid.values(codes[:, columns], columns), values[:, columns])
    assert grid.ends == ((-8, 7) if scheme.op == "QQQGemm" else (0, 7))


# ---------------------------------------------------------------- switches, seeds, resume


def test_switches_of_ones_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    rule = "    assert settings.damp == {}\n    return grid.round(target)\n"
    text = SWITCHES.replace("from dataclasses", "import torch\nfrom dataclasses", 1)
    for number, (more, damp) in enumerate(
        (((), 0.01), (("--effort", "fast"), 0.1), (("--effort", "fast", "--set", "damp=7"), 7.0))
    ):
        body = re.sub(r": \.\.\..*\n", ":\n" + rule.format(damp), text)
        file, out = _file(tmp_path, body, f"my_method_{number}.py"), tmp_path / str(number)
        assert calibrate_tiny(tiny_model_dir, out, "--method", str(file), *more) == 0
        switches = read_quant(out / "quant").calibration["settings"]["switches"]
        assert switches == {
            "rotation": "hadamard",
            "smooth": "none",
            "clip_steps": 40,
            "correct": 1.0,
            "damp": damp,
        }


def test_unknown_switches_list_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path, SWITCHES)
    more = ("--method", str(file), "--set", "dump=1")
    assert calibrate_tiny(tmp_path / "none", tmp_path / "out", *more) == 2
    assert capsys.readouterr().err == (
        "--set dump=1: got the switch 'dump', expected one of my_method's: "
        "rotation, smooth, clip_steps, correct, damp. Write --set NAME=VALUE.\n"
    )


STOCHASTIC = """
import torch
from calibration.blocks.rounding import Rounded
def round(target, hessian, grid):
    step = grid.values(grid.round(target) + 1) - grid.values(grid.round(target))
    noise = torch.rand(target.shape, generator=grid.generator, device=target.device) - 0.5
    codes = grid.round(target + step * noise).to(torch.int32)
    return Rounded(codes, grid.refitted(target, codes.float(), hessian), "thrown dice")
"""


def test_random_rounding_is_of_the_seed_and_may_refit(tiny_model_dir: Path, tmp_path: Path) -> None:
    file, codes = _file(tmp_path, STOCHASTIC, "dice.py"), {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        more = ("--method", str(file), "--seed", seed, "--set", "rotation=none")
        assert calibrate_tiny(tiny_model_dir, tmp_path / name, *more) == 0
        quant = read_quant(tmp_path / name / "quant")
        codes[name] = [
            quant.linear(f"model.layers.{block}.mlp.down_proj").arrays.codes for block in (0, 1)
        ]
    assert np.array_equal(codes["a"], codes["b"]) and not np.array_equal(codes["a"], codes["c"])
    notes = [block["notes"] for block in quant.calibration["blocks"]]
    assert notes == [[f"{site}: thrown dice" for site in SITES]] * 2


@pytest.mark.slow
def test_a_changed_file_is_made_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    """By the command, as each run imports the file anew; then an untouched one is kept."""
    file, out = _file(tmp_path, NEAREST), tmp_path / "out"
    line = (
        f"{tiny_model_dir} --wbits 4 --abits 8 --nsamples 2 --seqlen 32 --out {out} "
        f"--method {file.name} --until quant --offline --resume --progress json"
    )

    def told() -> list[str]:
        # A relative path is that of whoever types it.
        code, stdout, err = run_command(tmp_path, "exporter", *line.split(), place=tmp_path)
        assert code == 0, err
        events = [json.loads(line) for line in stdout.splitlines()]
        return [event["text"] for event in events if event["event"] == "message"]

    assert len(told()) == 4  # the estimate, blocks and head
    before = (out / "quant" / "model-00001-of-00001.safetensors").read_bytes()
    assert told() == ["quant: kept, nothing changed"]
    _file(tmp_path, "def round(target, hessian, grid):\n    return grid.round(target * 0.5)\n")
    assert len(told()) == 3  # blocks and head
    assert (out / "quant" / "model-00001-of-00001.safetensors").read_bytes() != before


def test_an_edited_file_is_another_method(tmp_path: Path) -> None:
    first = _method(tmp_path, NEAREST)
    assert first.looks_at_data
    assert find_method("my_method", tmp_path / "my_method.py") is first
    second = _method(tmp_path, "def quantize(weight, bias, scheme): ...\n")
    assert second is not first and not second.looks_at_data
    assert find_method("my_method", tmp_path / "my_method.py") is second


# ---------------------------------------------------------------- wrong results


WRONG = {
    "[1, 2]": "got list, expected a tensor of codes [128, 64]",
    "grid.round(target).T": "got float32 [64, 128], expected codes [128, 64]",
    "grid.round(target).to(torch.complex64)": "got complex64 [128, 64], expected codes [128, 64]",
    "grid.round(target) + torch.nan": "got code nan at [0, 0], expected whole numbers from -8 to 7",
    "target * 0 + 0.5": "got code 0.5 at [0, 0], expected whole numbers from -8 to 7",
    "torch.full_like(target, 8, dtype=torch.int64)": (
        "got code 8 at [0, 0], expected whole numbers from -8 to 7"
    ),
    "torch.where(target == target[5, 9], -9, 0)": (
        "got code -9 at [5, 9], expected whole numbers from -8 to 7"
    ),
}


@pytest.mark.parametrize(("result", "problem"), WRONG.items(), ids=WRONG)
def test_results_that_are_no_codes(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    result: str,
    problem: str,
) -> None:
    text = f"import torch\ndef round(target, hessian, grid):\n    return {result}\n"
    file = _file(tmp_path, text)
    assert calibrate_tiny(tiny_model_dir, tmp_path / "out", "--method", str(file)) == 2
    assert capsys.readouterr().err == (
        f"method 'my_method', {QKV} of block 1: {problem}. "
        "Let round give what grid.round gives, or such codes changed.\n"
    )
    assert not (tmp_path / "out" / "quant").exists()


def test_codes_of_few_levels(tiny_model_dir: Path) -> None:
    task = block_task(tiny_model_dir, scheme=QuantScheme("ABQGemm", "mine", 2, 8, True))
    moments = Moments(128, cross=False)
    moments.hessian += torch.eye(128)
    solver = SiteSolver(task, task.weights, lambda target, *_: torch.full_like(target, 5))
    with pytest.raises(InputError) as caught:
        solver(DOWN, moments)
    assert str(caught.value).startswith(
        f"method 'mine', {DOWN} of block 1: got code 5 at [0, 0], "
        f"expected whole numbers from 0 to 4. "
    )


@pytest.mark.parametrize("name", ["target", "hessian"])
def test_arguments_changed_in_place(tiny_model_dir: Path, name: str) -> None:
    def rule(target: Any, hessian: Any, grid: SiteGrid, settings: object) -> Any:
        codes = grid.round(target)
        {"target": target, "hessian": hessian}[name][0] += 1
        return codes

    moments = Moments(64, cross=False)
    moments.hessian += torch.eye(64)
    task = block_task(tiny_model_dir)
    with pytest.raises(InputError) as caught:
        SiteSolver(task, task.weights, rule)(QKV, moments)
    assert str(caught.value) == (
        f"method 'qqq', {QKV} of block 1: got a {name} that round has changed in place, "
        f"expected it as it was. Work on {name}.clone()."
    )


def test_a_site_that_sees_nothing_is_not_asked(tiny_model_dir: Path) -> None:
    def rule(*arguments: object) -> Any:
        raise AssertionError("asked")

    task = block_task(tiny_model_dir)
    for value in (0.0, float("nan")):
        solver, moments = SiteSolver(task, task.weights, rule), Moments(64, cross=False)
        moments.hessian += value
        assert solver(QKV, moments).codes.shape == (128, 64)
        assert solver.notes == [f"{QKV}: no usable calibration inputs, rounded to nearest"]


# ---------------------------------------------------------------- wrong files


FILES = {
    "x = 1\n": (
        "method 'my_method': got none of them in its file, expected one of "
        "round(target, hessian, grid), quantize(weight, bias, scheme) and METHOD. "
        "See docs/methods.md for a file to copy."
    ),
    f"{NEAREST}METHOD = 1\n": (
        "method 'my_method': got round and METHOD in its file, expected one of "
        "round(target, hessian, grid), quantize(weight, bias, scheme) and METHOD. "
        "See docs/methods.md for a file to copy."
    ),
    "def round(weight, grid): ...\n": (
        "method 'my_method': got round(weight, grid), expected round(target, hessian, grid) or "
        "round(target, hessian, grid, settings). Take these arguments, in this order."
    ),
    f"{NEAREST}SETTINGS = dict\n": (
        "method 'my_method': got SETTINGS = <class 'dict'>, expected a dataclass derived from "
        "WalkSettings of calibration.blocks.settings. See docs/methods.md for switches to copy."
    ),
    SWITCHES.replace("float = 0.01", "str = 'much'"): (
        "method 'my_method': got the switch damp with the default 'much', expected a bool, int or "
        'float. Give it such a default, or metadata={"choices": ("one", "other")}.'
    ),
    "def quantize(*arguments): ...\nfrom calibration.blocks.settings import WalkSettings as SETTINGS": (
        "method 'my_method': got SETTINGS beside quantize(weight, bias, scheme), which takes none, "
        "expected no SETTINGS. Leave them out, or define round(target, hessian, grid, settings)."
    ),
    f"{NEAREST}DECLARATION = {{'op': 'ABQGemm'}}\n": (
        "method 'my_method': got DECLARATION = {'op': 'ABQGemm'}, expected a Declaration of "
        "calibration.methods. See docs/methods.md for one to copy."
    ),
    f"{DECLARED.replace('ABQGemm', 'FooGemm')}{NEAREST}": (
        "method 'my_method': got op 'FooGemm' in its DECLARATION, expected one of ABQGemm, QQQGemm. "
        "Check the spelling."
    ),
    f"from calibration.methods import Declaration\nDECLARATION = Declaration(codes=('uint8',))\n{NEAREST}": (
        "method 'my_method': got uint8 codes, expected int8, which QQQGemm stores, the op of w4a8. "
        "Choose bits, groups or --act-quant that another op than QQQGemm takes, or declare in the "
        "method which op it is for."
    ),
}


@pytest.mark.parametrize(("text", "message"), FILES.items(), ids=range(len(FILES)))
def test_files_that_are_no_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    """Told before the model is looked for, let alone opened."""
    file = _file(tmp_path, text)
    assert calibrate_tiny(tmp_path / "none", tmp_path / "out", "--method", str(file)) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my_method.py"

    def told() -> str:
        assert calibrate_tiny(tmp_path / "none", tmp_path / "out", "--method", str(file)) == 2
        return capsys.readouterr().err

    assert told() == f"--method: got no such file {file}, expected a .py file. Check the path.\n"
    _file(tmp_path, "import no_such_package\n")
    assert told() == (
        f"{file}: got ModuleNotFoundError: No module named 'no_such_package'; expected a file that "
        "Python imports. Run python my_method.py to see where.\n"
    )
    _file(tmp_path, DECLARED.replace('("uint8",)', '"uint8"') + NEAREST)
    assert told().startswith(f'{file}: got TypeError: codes is a tuple, ("uint8",); ')
    _file(tmp_path, "def round(:\n")
    assert told().startswith(f"{file}: got SyntaxError: invalid syntax (my_method.py, line 1); ")
    file = _file(tmp_path, NEAREST, "rtn.py")
    assert told() == (
        f"--method {file}: got a file with the name of the method 'rtn', expected one of its own. "
        "Rename the file: folders and reports know a method by its name.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ("target, hessian, grid", 3),
        ("t, h, g, /, *, key=1", 3),
        ("target, hessian, grid, settings", 4),
        ("target, hessian, grid, settings=None", 4),
    ],
)
def test_the_settings_go_to_a_fourth_parameter(tmp_path: Path, arguments: str, taken: int) -> None:
    method = _method(tmp_path, f"def round({arguments}): return [*locals().values()][:4]\n")
    assert method.block_method.rule(1, 2, 3, 4)[:taken] == [1, 2, 3, 4][:taken]  # type: ignore


# ---------------------------------------------------------------- weights alone, and what is declared


QUANTIZE = """
from plugins.core.op_spec import QuantArrays
from calibration.methods.rtn import quantize as nearest
def quantize(weight, bias, scheme):
    found = nearest(weight, bias, scheme)
    return QuantArrays({codes}, found.scale, found.zero, found.scale_group, found.bias)
"""


def test_weights_alone(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path, DECLARED + QUANTIZE.format(codes="found.codes // 2"))
    out = tmp_path / "out"
    assert calibrate_tiny(tiny_model_dir, out, "--method", str(file)) == 0
    quant = read_quant(out / "quant")
    assert (quant.scheme.op, quant.scheme.act_symmetric) == ("ABQGemm", False)  # as declared
    assert quant.linear("model.layers.0.mlp.up_proj").arrays.codes.max() == 7
    assert quant.calibration["method"].keys() == {"file", "sha256"}
    file = _file(tmp_path, QUANTIZE.format(codes='found.codes.astype("uint8")'), "wrong.py")
    assert calibrate_tiny(tiny_model_dir, tmp_path / "other", "--method", str(file)) == 2
    assert capsys.readouterr().err == (
        "method 'wrong', model.layers.0.self_attn.q_proj.codes: got uint8 [64, 64], expected int8 "
        "[64, 64]. Let quantize give the arrays that docs/quant_format.md lists for this op.\n"
    )
    assert not (tmp_path / "other" / "quant").exists()


def test_a_budget_over_a_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Measured in the file's coordinates and rounded by it, with the bits whose codes it makes."""
    file = _file(tmp_path, NEAREST)
    more = ("--method", str(file), "--budget", "5")
    assert calibrate_tiny(tiny_model_dir, tmp_path / "out", *more) == 0
    quant = read_quant(tmp_path / "out" / "quant")
    assert {scheme.method for scheme in quant.schemes} == {"my_method"} and len(quant.schemes) > 1


def test_settings_of_another_method(
    tiny_model_dir: Path, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from calibration.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(tiny_model_dir), offline=True)
    with pytest.raises(InputError) as caught:
        quantize_model(checkpoint, QQQ, QuantizeOptions(), tmp_path)
    assert str(caught.value) == (
        "method 'qqq': got MethodSettings without act_order, clip_steps, correct, damp, gptq, "
        "refits, rotation, smooth, expected QqqSettings. "
        "Give CalibrationSettings(method=QqqSettings())."
    )


ROTATES = """
from calibration.blocks.rounding import RoundingMethod
class Always(RoundingMethod):
    def rotation(self, settings):
        return "orthogonal"
    def wants_real(self, settings):
        return False
    def calibrate(self, task):
        from dataclasses import replace
        from calibration.blocks.settings import WalkSettings
        return super().calibrate(replace(task, settings=replace(task.settings, method=WalkSettings())))
METHOD = Always(lambda target, hessian, grid, settings: grid.round(target))
"""


def test_a_rotation_without_a_switch_is_recorded(tiny_model_dir: Path, tmp_path: Path) -> None:
    from calibration.transforms.rotation import Rotation
    from exporter.proof.basis import recorded_rotation

    file = _file(tmp_path, ROTATES)
    more = ("--method", str(file), "--seed", "3")
    assert calibrate_tiny(tiny_model_dir, tmp_path / "out", *more) == 0
    quant = read_quant(tmp_path / "out" / "quant")
    assert quant.calibration["settings"]["switches"] == {}
    assert quant.calibration["rotation"] == "orthogonal"
    found = recorded_rotation(quant)
    assert found is not None
    assert torch.equal(found.residual, Rotation.make("orthogonal", 64, 16, 3).residual)


def test_declarations_of_the_package() -> None:
    made = {name: find_method(name) for name in method_names()}
    assert list(made) == ["abq", "qqq", "rtn"]
    assert {one.declaration.op for one in made.values()} == {None}  # the ops name their methods
    assert {name: op_spec(name).method for name in op_names()} == {
        "ABQGemm": "abq",
        "QQQGemm": "qqq",
    }
    assert [name for name, one in made.items() if one.declaration.counts_processes] == ["abq"]
    assert not made["abq"].makes(QQQ) and made["qqq"].makes(QQQ) and made["rtn"].makes(W3A6)
    assert made["rtn"].settings is MethodSettings
    with pytest.raises(InputError, match="method 'abq': got uint8 codes, expected int8"):
        made["abq"].check(QQQ)
    assert made["rtn"].check_settings(CalibrationSettings()) is None


def test_settings_import_nothing_heavy() -> None:
    names = [
        f"calibration.methods.{path.parent.name}.settings"
        for path in (REPOSITORY / "calibration" / "methods").glob("*/settings.py")
    ]
    assert len(names) >= 2
    code = f"import sys, {', '.join(names)}; print({{'torch', 'numpy', 'onnx'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
