"""The report's part on calibration: what each block lost by rounding, before and after, and what
went otherwise than planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.report.chart import bar, escape, table

__all__ = ["calibration_section"]


def calibration_section(calibration: Mapping[str, Any]) -> str:
    """HTML of a quant folder's "calibration"; "" for methods without data."""
    blocks = calibration.get("blocks")
    if not blocks:
        return ""
    settings, (count, length) = calibration["settings"], calibration["windows"]
    notes = "".join(
        f"<li>{escape(f'block {index}: {note}')}</li>"
        for index, block in enumerate(blocks, 1)
        for note in block["notes"]
    )
    largest = max(block["loss_before"] for block in blocks) or 1.0
    rows = [
        (
            "",
            [
                str(index),
                f"{block['loss_before']:.3g}",
                f"{block['loss_after']:.3g}",
                bar(block["loss_after"] / largest, f"block {index}"),
            ],
        )
        for index, block in enumerate(blocks, 1)
    ]
    return (
        f'<section><h2>Calibration</h2><p class="soft">{count} windows of {length} tokens of '
        f"{escape(settings['calib'])}, effort "
        f"{escape(settings['effort'])}, seed {settings['seed']}. Squared output error of the "
        f"linears, as a part of the outputs' "
        f"squares: of rounding to nearest, and of the codes that were kept.</p>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "<details><summary>Block by block</summary>"
        + table(["block", "to nearest", "kept", ""], rows, "calibration by block")
        + "</details></section>"
    )
