"""The report's two verdicts, kept apart: that what runs is what was quantized, and how near that is
to the float model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from exporter.report.chart import escape

__all__ = ["export_verdict", "loses", "quality_section", "quality_verdict", "verdicts"]

Data = Mapping[str, Any]
# (most KL in nats, most perplexity in units of the float model's): style and words of the badge
_NEAR, _SOME = (0.1, 1.1), (0.5, 1.5)
_TRAINED = 0.1  # of chance's perplexity: a float model beyond it knows no such text


def export_verdict(data: Data) -> tuple[str, str]:
    """CSS class and words."""
    return ("", "export proven") if data["validation"]["ok"] else ("bad", "export not proven")


def quality_verdict(quality: Data | None) -> tuple[str, str]:
    """CSS class and words: green only for a model that is near a float model that knows the text."""
    if quality is None:
        return "grey", "quality not measured"
    if quality["float_ppl"] > _TRAINED * quality["chance"]:
        return "grey", "the float model itself does not know this text"
    found = quality["kl"], quality["ppl"] / quality["float_ppl"]
    for style, words, most in (("", "near the float model", _NEAR), ("warn", "some loss", _SOME)):
        if all(value <= limit for value, limit in zip(found, most, strict=True)):
            return style, words
    return "bad", "far from the float model"


def loses(quality: Data | None) -> bool:
    """Whether the model is measurably not near its float model."""
    return quality_verdict(quality)[0] in ("warn", "bad")


def verdicts(data: Data, export_facts: Iterable[tuple[str, str]]) -> str:
    """Two cards; `export_facts` are pairs of a number and what it is, as HTML."""
    validation, quality = data["validation"], data.get("quality")
    alert = (
        ""
        if validation["ok"]
        else f'<p class="alert"><b>First failure:</b> {escape(validation["first_failure"])}.</p>'
    ) + "".join(
        f'<p class="alert">In the ONNX file, not what quant/ gives: {escape(cause)}.</p>'
        for cause in validation.get("causes", ())
    )
    alert += "".join(
        f'<p class="alert warn">{escape(warning)}</p>' for warning in validation.get("warnings", ())
    )
    if quality is None:
        facts = []
        note = "It is measured of a whole export that is proven, where the float model is there."
    else:
        facts = [
            (f"{_perplexity(quality['ppl'])}", "perplexity"),
            (f"{_perplexity(quality['float_ppl'])}", "of the float model"),
            (f"{quality['kl']:.3g}", "KL divergence, nats"),
            (f"{quality['top1']:.0%}", "same next token as float"),
        ]
        seen = " It is text that calibration has seen." if quality.get("seen") else ""
        if codes := quality.get("codes"):
            seen += (
                f" The float model is the {escape(codes)} checkpoint with its codes dequantized."
            )
        note = (
            f"{quality['tokens']} tokens of {escape(quality['text'])}, {quality['windows']} windows "
            f"of {quality['seqlen']}, each scored alone.{seen}"
        )
    return '<div class="verdicts">{}{}</div>'.format(
        _card(
            "Export",
            export_verdict(data),
            "What runs is what was quantized. It says nothing of what quantizing cost.",
            export_facts,
            alert,
        ),
        _card("Quality against float", quality_verdict(quality), note, facts),
    )


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _card(
    title: str,
    verdict: tuple[str, str],
    note: str,
    facts: Iterable[tuple[str, str]],
    alert: str = "",
) -> str:
    style, words = verdict
    numbers = "".join(f"<li><b>{value}</b><small>{what}</small></li>" for value, what in facts)
    return (
        f'<section><h2>{title}</h2><span class="pill {style}">{escape(words)}</span>'
        f'<p class="soft">{note}</p>{alert}<ul class="facts">{numbers}</ul></section>'
    )


def quality_section(data: Data) -> str:
    """What both models write after the same words, and the perplexity that a runner of the export had;
    "" where nothing was measured.
    """
    quality, perplexity = data.get("quality"), data["perplexity"]
    samples, scored = "", ""
    if quality is not None:
        samples = "".join(
            f"<h3>{name}</h3><blockquote><span class='soft'>{_flowing(quality['prompt'])}</span>"
            f"{_flowing(quality[key])}</blockquote>"
            for name, key in (("Float", "float_sample"), ("Quantized", "sample"))
        )
    if perplexity:
        scored = (
            f"<p>Perplexity of the export in {escape(str(perplexity.get('runner', '')))}: "
            f"<b>{_perplexity(perplexity['ppl'])}</b>.</p>"
        )
    if not samples and not scored:
        return ""
    return (
        "<section><h2>What both write</h2><p class='soft'>The likeliest tokens behind the same "
        "beginning. A text that calibration has seen flatters; --eval scores one of yours.</p>"
        f"{samples}{scored}</section>"
    )


def _flowing(text: str) -> str:
    """HTML of a text without its line ends."""
    return escape(re.sub(r"\s+", " ", text))
