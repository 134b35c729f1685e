"""The page: well-formed, self-contained, and true to its data."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from exporter.report.html import page

VOID = {"meta", "br", "line"}


def row(level: str, tensor: str, **changes: Any) -> dict[str, Any]:
    operator = (
        {"operator": "model.layers.0.mlp.down_proj", "operator_error": 1e-3, "operator_limit": 4e-3}
        if level == "export"
        else {"operator": "", "operator_error": None, "operator_limit": None}
    )
    return {
        "level": level,
        "phase": "prefill",
        "tensor": tensor,
        "cosine": 0.9991,
        "snr_db": 27.5,
        "max_abs": 0.5,
        "relative": 0.042,
        "limit": 0.1,
        "agreement": 0.75 if tensor == "logits" else None,
        "ok": True,
        **operator,
        **changes,
    }


PROFILE = {"name": "decode", "inputs": {"input_ids": {"min": [1, 1], "opt": [1, 1], "max": [1, 1]}}}
HEAD = {
    "bits": "w8a8",
    "rise": 0.0005,
    "loss_float": 3.0004,
    "loss_quantized": 3.0002,
    "loss_error": 0.0008,
    "tokens": 992,
}
DATA: dict[str, Any] = {
    "model": "tiny",
    "label": "w4a8",
    "source": {"fingerprint": "0123456789abcdef0123"},
    "command": "python -m exporter 'a & b'",
    "scheme": {
        "op": "QQQGemm",
        "method": "rtn",
        "wbits": 4,
        "abits": 8,
        "balanced": False,
        "group_size": 64,
        "act_symmetric": True,
        "dtype": "float16",
        "kv_bits": 16,
    },
    "shape": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "mixed": None,
    "head": None,
    "sizes": {
        "bits_per_weight": 4.25,
        "model_float_bytes": 2e6,
        "model_quant_bytes": 1e6,
        "linear_float_bytes": 1.5e6,
        "linear_quant_bits": 4e6,
        "rest_bytes": 5e5,
    },
    "request": {"model": "<tiny>", "calib": "default"},
    "stages": [{"name": "quant", "seconds": 1.5, "peak_rss": 3e8, "bytes": 1e6}],
    "engine": {
        "edition": "tensorrt-rtx",
        "version": "1.7.1.116",
        "bytes": 2e6,
        "parse_seconds": 0.5,
        "build_seconds": 2.5,
        "layers": {"PLUGIN_V3": 4, "SHUFFLE": 9},
        "custom_nodes": {"QQQGemm": 4},
        "profiles": [PROFILE],
    },
    "validation": {
        "ok": True,
        "first_failure": "",
        "notes": ["No GPU here."],
        "tokens": 24,
        "steps": 3,
        "text": "default",
        "seconds": 3.0,
        "rows": [
            row(level, tensor)
            for level in ("export", "quantisation")
            for tensor in ("model.layers.0.output", "logits")
        ],
    },
    "perplexity": None,
    "quality": None,
    "next": [("python -m deploy generate 'out <1>'", "Let it write")],
    "environment": {
        "cpu": "a CPU",
        "gpu": "no GPU",
        "system": "Linux",
        "versions": {"torch": "2.13.0"},
    },
}


QUALITY = {
    "text": "held <out>.txt",
    "windows": 4,
    "seqlen": 64,
    "tokens": 252,
    "float_ppl": 12.5,
    "ppl": 13.0,
    "top1": 0.93,
    "kl": 0.031,
    "chance": 49152,
    "prompt": "The\n river",
    "float_sample": " runs  on",
    "sample": " runs <dry>",
}


class Checker(HTMLParser):
    """Collects text and ids; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [
            str(values[name]) for name in ("src", "href", "xlink:href") if name in values
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def read(data: dict[str, Any]) -> tuple[Checker, str]:
    markup = page(data)
    checker = Checker()
    checker.feed(markup)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    return checker, " ".join(" ".join(checker.words).split()).replace(" .", ".").replace(" :", ":")


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(DATA), **changes}


def test_page_is_whole_and_needs_no_network() -> None:
    checker, text = read(DATA)
    markup = page(DATA)
    assert (
        markup.startswith("<!doctype html>")
        and '<meta name="viewport"' in markup
        and "prefers-color-scheme:dark" in markup
    )
    assert checker.links == [] and not re.search(r"https?:|url\(|@import|<script", markup)
    for words in (
        "Export export proven What runs is what was quantized.",
        "25% of its limit, the worst operator 75% same next token",
        "Quality against float quality not measured",
        "4.25",
        "2.00× smaller",
        "4 PLUGIN_V3 for 4 custom nodes (4 QQQGemm)",
        "No GPU here.",
        "python -m exporter 'a & b'",
        "<tiny>",
        "model.layers.0.output",
        "0.999100",
        "27.5",
        "torch 2.13.0",
        "profile decode",
        "input_ids [1, 1] to [1, 1]",
        "4-bit weights, 8-bit activations, groups of 64; QQQGemm, method rtn.",
    ):
        assert words in text, words


def test_a_failure_is_on_top_and_marked() -> None:
    data = changed()
    data["validation"] |= {"ok": False, "first_failure": "got 1 < 2 at model.layers.0.output"}
    data["validation"]["rows"][0] = row(
        "export",
        "model.layers.0.output",
        ok=False,
        operator_error=None,
        relative=None,
        cosine=None,
        snr_db=None,
        max_abs=None,
    )
    text = read(data)[1]
    assert text.startswith("tiny w4a8: export report tiny 4-bit weights, ")
    assert "Export export not proven" in text and "export proven" not in text
    assert "First failure: got 1 < 2 at model.layers.0.output." in text
    assert page(data).count('<tr class="bad">') == 1 and "not finite or no value" in text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"engine": None}, "No engine was built."),
        (
            {"perplexity": {"ppl": 12.3456, "runner": "onnxruntime"}},
            "Perplexity of the export in onnxruntime: 12.35.",
        ),
        ({"stages": []}, "validation 3.0"),
        (
            {
                "scheme": {
                    **DATA["scheme"],
                    "abits": 16,
                    "balanced": True,
                    "wbits": 2,
                    "group_size": 0,
                    "op": "ABQGemm",
                }
            },
            "2-bit balanced weights, float16 activations, one scale per output channel; "
            "ABQGemm, method rtn.",
        ),
        ({}, "KV cache float16"),
        ({}, "head float16"),
        ({"head": "w8a8"}, "head w8a8"),
        ({"head": "w8a8"}, "linear layers and head, scales included"),
        (
            {"head": "w8a8", "calibration": {"blocks": [], "head": HEAD}},
            "head w8a8, +0.05% perplexity by KL divergence on 992 calibration tokens (their loss "
            "-0.0002, standard error 0.0008)",
        ),
        (
            {"calibration": {"blocks": [], "head": {**HEAD, "rise": 0.5}}},
            "head float16, since w8a8 would cost +50.00% perplexity by KL divergence on 992 ",
        ),
        (
            {"scheme": {**DATA["scheme"], "kv_bits": 4}},
            "8-bit activations, groups of 64, 4-bit KV cache; QQQGemm, method rtn.",
        ),
        (
            {"scheme": {**DATA["scheme"], "kv_bits": 4}},
            "KV cache 4 bits, asymmetric per token and head",
        ),
    ],
)
def test_what_is_there_or_not(changes: dict[str, Any], words: str) -> None:
    assert words in read(changed(**changes))[1]


@pytest.mark.parametrize(
    ("changes", "style", "words"),
    [
        ({}, "", "near the float model"),
        ({"kl": 0.11}, "warn", "some loss"),
        ({"ppl": 14.0}, "warn", "some loss"),
        ({"ppl": 19.0}, "bad", "far from the float model"),
        ({"kl": 0.6}, "bad", "far from the float model"),
        ({"ppl": 46950.0, "kl": 9.0, "top1": 0.0}, "bad", "far from the float model"),
        # An untrained model guesses, and so does what is made of it: nothing is lost, nor right.
        (
            {"float_ppl": 50000.0, "ppl": 46950.0, "kl": 0.0},
            "grey",
            "the float model itself does not know this text",
        ),
    ],
)
def test_the_quality_has_a_badge_of_its_own(
    changes: dict[str, Any], style: str, words: str
) -> None:
    data = changed(quality={**QUALITY, **changes})
    markup = page(data)
    assert f'<span class="pill {style}">{words}</span>' in markup
    assert '<span class="pill ">export proven</span>' in markup
    assert ("46,950" in markup) is ("ppl" in changes and changes["ppl"] > 1000)


def test_a_text_that_calibration_has_seen_is_called_so() -> None:
    for seen in (False, True):
        text = read(changed(quality={**QUALITY, "seen": seen}))[1]
        assert ("each scored alone. It is text that calibration has seen." in text) is seen


def test_both_models_are_shown_writing() -> None:
    text = read(changed(quality=QUALITY))[1]
    for words in (
        "near the float model 252 tokens of held <out>.txt, 4 windows of 64, each scored alone. "
        "13.00 perplexity 12.50 of the float model 0.031 KL divergence, nats 93% same next token",
        "Float The river runs on Quantized The river runs <dry>",
    ):
        assert words in text, words


def test_the_page_ends_with_what_comes_next() -> None:
    text = read(DATA)[1]
    assert text.endswith(
        "Next Let it write python -m deploy generate 'out <1>' anybit-trt; the numbers are in "
        "report.json."
    )


def test_mixed_bits_get_their_section() -> None:
    scheme = {**DATA["scheme"], "label": "w4a8-g64", "nodes": 3, "weights": 3e6}
    other = {
        **scheme,
        "label": "w2a16",
        "op": "ABQGemm",
        "abits": 16,
        "act_symmetric": False,
        "nodes": 1,
        "weights": 1e6,
    }
    layer = {"self_attn.qkv_proj": "w4a8-g64", "mlp.down_proj": "w2a16"}
    mixed = {
        "exceptions": 1,
        "nodes": 4,
        "schemes": [scheme, other],
        "layers": [layer, {**layer, "mlp.down_proj": "w4a8-g64"}],
    }
    text = read(changed(mixed=mixed))[1]
    for words in (
        "Mixed, 4.2 bits per weight on average, scales included: 1 of 4 GEMM nodes differ from "
        "4-bit weights, 8-bit ",
        "w4a8-g64 QQQGemm 8 bits, symmetric per token 3 3.00",
        "w2a16 ABQGemm float16 1 1.00",
        "layer self_attn.qkv_proj mlp.down_proj 0 w4a8-g64 w2a16 1 w4a8-g64 w4a8-g64",
        "mixed precision 1 nodes differ from the following, see Bits",
    ):
        assert words in text, words
    assert 'aria-label="25% of the weights"' in page(changed(mixed=mixed))


@pytest.mark.parametrize(
    "limit, remark",
    [
        (0.3, "The limit is half a step of the float weights' own range"),
        (None, "This method may transform the weights, so their errors are shown and not judged."),
    ],
)
def test_weights_get_their_table(limit: float | None, remark: str) -> None:
    data = changed()
    worst = {"operator": "row 12", "operator_error": 0.25, "operator_limit": limit}
    data["validation"]["rows"].insert(
        0, row("weights", "model.layers.0.mlp.up_proj", phase="", limit=limit, **worst)
    )
    text = read(data)[1]
    assert "Weights: the tensors in quant/ against the float model's " in text and remark in text
    end = "3.00e-01 row 12 2.5e-01 3.0e-01" if limit else "– row 12 2.5e-01 –"
    assert f"model.layers.0.mlp.up_proj 0.999100 27.5 0.5 4.20e-02 {end}" in text
    assert "25% of its limit, the worst operator" in text  # not of the weights


def test_equal_tensors_do_not_squeeze_the_chart() -> None:
    data = changed()
    data["validation"]["rows"][0] = row(
        "export", "model.layers.0.output", snr_db=200.0, relative=0.0
    )
    text, markup = read(data)[1], page(data)
    assert (
        "model.layers.0.output 0.999100 equal" in text
        and "60 dB stands for more, up to equal tensors." in text
    )
    assert ">60</text>" in markup and ">200</text>" not in markup


def test_kernel_rows_get_their_table() -> None:
    data = changed()
    data["validation"]["rows"].append(row("kernel", "present.0.key"))
    assert "Kernel: the TensorRT engine against ONNX Runtime, prefill" in read(data)[1]


def test_names_from_elsewhere_are_shown_and_not_obeyed() -> None:
    """Every text of the data at once; the keys that choose a part of the page stay."""
    chosen = {"export", "quantisation", "weights", "kernel", "prefill", "decode", "", "input_ids"}
    chosen |= {"past_key_values.0.key", "QQQGemm"}
    hostile = "\x1b[2J\u202e\x85<b>&"

    def taint(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: taint(item) for key, item in value.items()}
        if isinstance(value, list):
            return [taint(item) for item in value]
        return f"{value}{hostile}" if isinstance(value, str) and value not in chosen else value

    data = taint(copy.deepcopy(DATA))
    data["engine"]["layers"][f"LAYER{hostile}"] = 2
    data["validation"] |= {"ok": False, "first_failure": f"layer{hostile}"}
    markup = page(data)
    assert not set(markup) & set("\x1b\u202e\x85") and "<b>&" not in markup
    assert markup.count("\\x1b[2J\\u202e\\x85&lt;b&gt;&amp;") > 20
