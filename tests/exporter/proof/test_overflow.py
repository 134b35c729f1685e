"""Activations that float16 cannot hold: named as such, by calibration, proof, eval and generate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calibration.progress import NullProgress
from deploy.__main__ import main as deploy
from exporter.__main__ import main as exporter
from exporter.run.finite import check_finite
from plugins.errors import CheckError

pytestmark = pytest.mark.slow  # whole exports

TEXT = str(Path(__file__).resolve().parents[3] / "calibration" / "default_text.txt")
WIDER = "xport with --dtype bfloat16 or float32, which hold larger numbers"


@pytest.fixture(scope="module")
def grown(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, float]], Path]:
    """grown({tensor: factor}) -> the tiny model with larger weights."""

    def make(factors: dict[str, float]) -> Path:
        folder = tmp_path_factory.mktemp("grown") / "model"
        shutil.copytree(tiny_model_dir, folder)
        tensors = load_file(folder / "model.safetensors")
        for name, factor in factors.items():
            tensors[f"model.layers.{name}.weight"] *= np.float32(factor)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="module")
def large_stream(grown: Callable[[dict[str, float]], Path]) -> Path:
    """A model whose residual stream reaches millions from layer 0 on."""
    return grown({"0.mlp.down_proj": 1e6})


@pytest.fixture(scope="module")
def large_product(grown: Callable[[dict[str, float]], Path]) -> Path:
    """A model whose residual stream is small, and the product in layer 0's MLP is not."""
    return grown({"0.mlp.up_proj": 1e5, "0.mlp.down_proj": 1e-5})


def _export(model: Path, out: Path, *options: str) -> int:
    words = ["--wbits", "8", "--abits", "8", "--engine", "none", "--offline", "--progress", "none"]
    return exporter([str(model), *words, "--out", str(out), *options])


@pytest.mark.parametrize("name", ["large_stream", "large_product"])
def test_the_proof_says_where_float16_ends(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    model, out = request.getfixturevalue(name), tmp_path / "out"
    assert _export(model, out, "--method", "rtn") == 3
    report = json.loads((out / "report" / "report.json").read_text())["validation"]
    failure = report["first_failure"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"validation of {out}: {failure}. See {out / 'report' / 'index.html'}."
    assert failure in (out / "report" / "index.html").read_text()
    if name == "large_stream":
        before, number, after = failure.partition(" at model.layers.0.output of ")
        found, _, peak = before.rpartition(", ")
        assert found == (
            "got numbers beyond float16 at model.layers.0.mlp.down_proj (export, prefill)"
        )
        assert 65504 < float(peak) < 1e7 and number
        assert after == f"the float model, expected at most 65504: e{WIDER}"
    else:
        assert failure == (
            "got numbers beyond float16 at model.layers.0.mlp.gate_up_proj (with "
            "post_attention_layernorm) (export, prefill), expected at most 65504: "
            f"e{WIDER}"
        )
    bad = [row for row in report["rows"] if row["overflow"]]
    assert {row["level"] for row in bad} == {"export", "as run"} and not any(
        row["ok"] for row in bad
    )


@pytest.mark.parametrize("name", ["large_stream", "large_product"])
def test_a_wider_type_holds_them(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    model = request.getfixturevalue(name)
    assert _export(model, tmp_path / "out", "--method", "rtn", "--dtype", "bfloat16") == 0


def test_calibration_sees_the_residual_stream(
    large_stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the export, and before the blocks that follow."""
    options = ("--nsamples", "2", "--seqlen", "32")
    assert _export(large_stream, tmp_path / "out", *options) == 2
    where, got, rest = capsys.readouterr().err.splitlines()[-1].partition("got ")
    number, _, rest = rest.partition(" ")
    assert where == "--dtype float16, model.layers.0: " and got
    assert 65504 < float(number) < 1e7
    assert rest == (
        "in the residual stream behind this layer, expected at most 65504. Use --dtype bfloat16 or "
        "float32, which hold larger numbers."
    )
    assert not (tmp_path / "out" / "quant").exists()
    wider = ("--dtype", "bfloat16", *options, "--until", "quant")
    assert _export(large_stream, tmp_path / "wider", *wider) == 0


@pytest.mark.parametrize(
    ("name", "got", "runners"),
    [
        ("large_stream", "65504", ("onnxruntime", "torch")),
        # The reference rounds as kernels do, which write 65504 for all that is larger.
        ("large_product", "NaN or Inf", ("onnxruntime",)),
    ],
)
def test_a_running_model_says_so(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    got: str,
    runners: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    model = request.getfixturevalue(name)
    assert _export(model, out, "--method", "rtn", "--until", "onnx") == 0
    for runner in runners:
        for command, *options in (
            ("generate", "--prompt", "The river"),
            ("eval", "--text", TEXT, "--first", "1"),
        ):
            assert deploy([command, str(out), *options, "--runner", runner]) == 3
            assert capsys.readouterr().err.splitlines()[-1] == (
                f"model.layers.0.output: got {got}, expected numbers below 65504: float16 overflows "
                f"at layer 0. E{WIDER}."
            )


def test_the_first_output_without_numbers_is_named() -> None:
    fine, nan, inf = np.ones((1, 2)), np.array([[0, np.nan]]), np.array([[np.inf, 0]])
    check_finite({"logits": fine, "present.0.key": inf}, "float16")
    check_finite({"logits": fine, "model.layers.0.output": 1e9 * fine}, "bfloat16")
    for outputs, first in (
        ({"logits": nan, "present.0.key": fine, "present.1.key": inf}, "present.1.key"),
        ({"logits": inf, "present.0.key": fine}, "logits"),
        ({"logits": nan}, "logits"),
        # by layer, in whatever order they come
        ({"logits": nan, "model.layers.10.output": nan, "present.2.key": inf}, "present.2.key"),
        (
            {"present.2.key": nan, "model.layers.1.output": nan, "logits": nan},
            "model.layers.1.output",
        ),
        ({"logits": nan, "model.layers.2.output": nan, "present.2.value": nan}, "present.2.value"),
        ({"logits": fine, "model.layers.3.output": inf}, "model.layers.3.output"),
    ):
        with pytest.raises(CheckError) as caught:
            check_finite(outputs, "float32")
        assert (caught.value.exit_code, str(caught.value)) == (
            3,
            f"{first}: got NaN or Inf, expected finite numbers. The model is broken: look at the "
            "report's first bad layer.",
        )


def test_an_export_that_alone_has_infinity_is_still_blamed(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    """The reference, given the same inputs, is finite there."""
    from exporter.proof.options import ValidateOptions
    from exporter.proof.validate import validate
    from tests.exporter.proof.test_validate import flip_a_norm

    out = tmp_path / "out"
    shutil.copytree(tiny_export(), out)
    flip_a_norm(out / "onnx", np.inf)
    result = validate(out, ValidateOptions(tokens=8, steps=0), NullProgress())
    assert result.first_failure.startswith("got a relative error of inf at ")
