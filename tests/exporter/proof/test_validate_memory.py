"""The memory of a proof: what is needed, what is done where it does not suffice, a refusal before the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.checkpoints.checkpoint import open_checkpoint
from calibration.families import Decoder
from calibration.progress import NullProgress
from calibration.quant.bits import as_map
from calibration.quant.folder import read_quant
from calibration.quant.scheme import QuantScheme
from exporter.pipeline import ExportRequest, Pipeline
from exporter.proof import onnx_levels
from exporter.proof import validate as proof
from exporter.proof.memory import Calls, Fit, Need, attention_windows, check_memory, memory_needed
from exporter.proof.options import ValidateOptions
from exporter.proof.pieces import FoldedSession
from exporter.proof.validate import validate
from exporter.run.onnxruntime import OnnxSession
from plugins.errors import InputError, UserError

QQQ, W8A8, W4A16 = (
    QuantScheme(op, "rtn", wbits, abits)
    for op, wbits, abits in (("QQQGemm", 4, 8), ("ABQGemm", 8, 8), ("ABQGemm", 4, 16))
)
WIDTHS = 2 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64))  # of its nodes' inputs and outputs
TOKENS = 64 + 8 + 2 * 17
BASE = 500_000_000 + 4 * TOKENS * 4 * (WIDTHS + 2 * 64 + 512)  # with what runners gave
WEIGHTS = 2 * 36864  # of the linears of the tiny model
REST = 512 * 64 + 5 * 64  # its embedding and norms


@pytest.fixture
def decoder(tiny_quant: Callable[..., Path]) -> Decoder:
    return read_quant(tiny_quant() / "quant").decoder


def free(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr("exporter.proof.memory.usable_memory", lambda: size)


@pytest.mark.parametrize(
    "scheme, per_weight", [(QQQ, 18), (replace(QQQ, group_size=64), 47), (W8A8, 55), (W4A16, 46)]
)
def test_the_need_follows_from_the_op(
    decoder: Decoder, scheme: QuantScheme, per_weight: int
) -> None:
    bytes_of_code = 4 if scheme.abits == 16 else 1
    reference = bytes_of_code * WEIGHTS + 4 * REST
    assert memory_needed(decoder, every(decoder, scheme), TOKENS) == Need(
        whole=BASE + per_weight * WEIGHTS,
        folded=BASE + max(per_weight * WEIGHTS // 2, reference),
        floats=BASE + 4 * (WEIGHTS + REST),
    )


def every(decoder: Decoder, scheme: QuantScheme) -> dict[str, QuantScheme]:
    return dict.fromkeys(decoder.nodes, scheme)


def test_each_node_needs_what_its_bits_do(decoder: Decoder) -> None:
    """The largest layer, or the head, where they come one after the other."""
    first = {node: W8A8 for node in decoder.nodes if ".layers.0." in node}
    need = memory_needed(decoder, every(decoder, QQQ) | first, TOKENS)
    assert need.whole == BASE + (18 + 55) * WEIGHTS // 2
    assert need.folded == BASE + 55 * WEIGHTS // 2
    whole = decoder.with_quantized_head()
    head, base = 512 * 64, BASE + 4 * TOKENS * 4 * (512 + 64)
    need = memory_needed(whole, every(whole, QQQ) | {"lm_head": W8A8}, TOKENS)
    assert need.whole == base + 18 * WEIGHTS + 55 * head
    assert need.folded == base + 55 * head


def test_what_does_not_fit_is_done_otherwise(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemes = every(decoder, W8A8)
    need = memory_needed(decoder, schemes, TOKENS)
    assert need.floats < need.folded < need.whole
    for size, expected in (
        (need.whole, Fit(False, True, need.whole)),
        (need.whole - 1, Fit(True, True, need.folded)),
        (need.folded, Fit(True, True, need.folded)),
        (None, Fit(False, True, need.whole)),
    ):
        free(monkeypatch, size)
        assert check_memory(decoder, schemes, TOKENS) == expected


def test_a_float_model_may_be_what_does_not_fit(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six layers, one of which is unpacked at a time."""
    model = tiny_llama(num_hidden_layers=6)
    decoder = open_checkpoint(str(model), offline=True).decoder
    schemes = every(decoder, QQQ)
    need = memory_needed(decoder, schemes, TOKENS)
    free(monkeypatch, need.floats - 1)
    assert check_memory(decoder, schemes, TOKENS) == Fit(True, False, need.folded)


def test_the_message_is_whole(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 400_000_000)
    with pytest.raises(InputError) as caught:
        check_memory(decoder, every(decoder, QQQ), TOKENS)
    assert str(caught.value) == (
        "validation: got 0.40 GB of free memory, expected 0.50 GB for 0 M weights. "
        "Use --until engine here, and validate on a machine with more memory."
    )


def test_the_calls_cross_a_window_that_is_not_too_long() -> None:
    assert Calls.within(2048) == Calls(64, 8, 16) and Calls.within(2048).tokens == TOKENS
    assert Calls.within(2048, [512, 4096]).prefill == 520
    assert Calls.within(2048, [1020]).prefill == Calls.within(2048, [512], prefill=64).prefill == 64
    assert Calls.within(12) == Calls(4, 8, 4) and Calls.within(5, prefill=9, steps=1) == Calls(
        4, 1, 4
    )


def test_before_a_run_as_much_is_asked_for_as_by_the_proof(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a window of its own, within the positions that are exported."""
    model = tiny_llama(architecture="Mistral", sliding_window=90, max_position_embeddings=256)
    asked: list[int] = []
    monkeypatch.setattr("exporter.proof.memory.check_memory", lambda *given: asked.append(given[2]))
    for longest in (128, 80):
        request = ExportRequest(
            model=str(model),
            schemes=as_map(W8A8),
            out=tmp_path,
            engine="none",
            max_seq=longest,
            offline=True,
        )
        Pipeline(request, NullProgress())
    assert asked == [98 + 8 + 2 * 17, TOKENS]
    decoder = open_checkpoint(str(model)).decoder
    assert [attention_windows(decoder, longest) for longest in (128, 80)] == [[90], []]


FOLDED = ValidateOptions(tokens=12, steps=1)


@pytest.mark.parametrize("scheme", [{"head": 8}, {"kv_bits": 4, "static": 32}], ids=str)
def test_a_folded_proof_judges_all_the_same(
    tiny_export: Callable[..., Path],
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: dict[str, Any],
) -> None:
    out, options = tiny_export(**scheme), replace(FOLDED, model=str(tiny_model_dir))
    monkeypatch.setattr(proof, "check_memory", lambda *_: Fit(True, False, 0))
    result = validate(out, options)
    assert result.ok, result.first_failure
    levels = dict.fromkeys(row.level for row in result.rows)
    assert list(levels) == ["weights", "export", "native", "as run"]
    native = [row for row in result.rows if row.level == "native"]
    assert {row.phase for row in native} == {"prefill", "decode", "padded batch"}
    assert {row.relative for row in native if row.tensor != "logits"} == {0.0}
    assert (
        "The float model does not fit into the memory, so what quantizing cost was not measured."
        in result.notes
    )


def test_a_body_that_differs_is_named(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.proof.pieces import OnnxPiece

    class Wrong(OnnxPiece):
        def infer(self, feeds: Any) -> dict[str, np.ndarray]:
            outputs = super().infer(feeds)
            name = "model.layers.1.mlp.down_proj.output.own"
            if name in outputs:
                outputs[name] = np.nextafter(outputs[name], np.float16(9))
            return outputs

    monkeypatch.setattr(proof, "check_memory", lambda *_: Fit(True, True, 0))
    monkeypatch.setattr(onnx_levels, "OnnxPiece", Wrong)
    assert validate(tiny_export(), FOLDED).first_failure == (
        "got other numbers at model.layers.1.mlp.down_proj (native, prefill: the native CPU kernels "
        "against the function bodies, both in ONNX Runtime), expected the same bits"
    )


def test_without_kernels_bodies_lead_layer_by_layer(
    tiny_export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny_export()
    missing = UserError("g++", "got no such program, expected a C++ compiler", "Install it")
    monkeypatch.setattr(onnx_levels, "native_library", lambda say: missing)
    monkeypatch.setattr(proof, "check_memory", lambda *_: Fit(True, True, 0))
    result = validate(out, FOLDED)
    assert result.ok and {row.level for row in result.rows} == {"export"}
    ids = np.arange(12)[None]
    with (
        FoldedSession(out / "onnx", 64, ["model.layers.0.output"], "float16", 2) as folded,
        OnnxSession(out / "onnx", 64, ["model.layers.0.output"], "float16") as whole,
    ):
        for piece in (ids, ids[:, :1]):
            np.testing.assert_array_equal(folded.run(piece), whole.run(piece))
