"""Processes of their own that are ready at once: forked from one that has imported whatever the
command lines load.
"""

from __future__ import annotations

from multiprocessing import get_context

__all__ = ["FORKS"]

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "calibration.quant.quantize",
        "calibration.methods.abq",
        "calibration.methods.qqq",
        "exporter.graph.decoder",
        "exporter.proof.prove",
        "exporter.proof.onnx_levels",
        "exporter.report.report",
        "onnxruntime",
        "polygraphy.comparator",
        "pytest",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)
