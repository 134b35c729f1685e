"""Names of everything in an artifact folder OUT: its stages, its own files, the files of each stage."""

from __future__ import annotations

__all__ = [
    "ATTRIBUTION",
    "BITS_FILE",
    "CHAT_FILE",
    "DATA_FILE",
    "DESCRIPTION",
    "ENGINE",
    "ENGINE_FILE",
    "ENGINE_RECORD",
    "HTML_FILE",
    "JSON_FILE",
    "LOCK",
    "MANIFEST",
    "MODEL_FILE",
    "ONNX",
    "PROOF_WORK",
    "QUANT",
    "QUANT_JSON",
    "REPORT",
    "SENSITIVITY",
    "STAGES",
    "WORK",
    "old",
    "partial",
]

# A stage is a folder below OUT, made from the one before it.
STAGES = QUANT, ONNX, ENGINE, REPORT = "quant", "onnx", "engine", "report"

# OUT itself
MANIFEST = "manifest.json"
LOCK = ".lock"  # held by the process that writes
ATTRIBUTION = "attribution.json"  # what python -m deploy attribute measured so far
WORK = ".calibration"  # finished blocks and weight files of a quant/ that is not whole
PROOF_WORK = ".proof"  # levels of a proof that is not over
SENSITIVITY = ".sensitivity.json"  # what --budget measured, for --resume

# OUT/quant
QUANT_JSON = "quant.json"
BITS_FILE = "bits.txt"  # the rules of a mixed model, to be used again

# OUT/onnx and OUT/engine
DESCRIPTION = "model.json"  # see calibration/out/description.py
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
CHAT_FILE = "chat.json"  # see exporter/chat.py
ENGINE_FILE = "model.engine"
ENGINE_RECORD = "engine.json"

# OUT/report
JSON_FILE = "report.json"
HTML_FILE = "index.html"


def partial(stage: str) -> str:
    """The folder in which a stage is written until it is whole."""
    return f".{stage}.partial"


def old(stage: str) -> str:
    """The folder that holds an earlier result while a new one takes its place."""
    return f".{stage}.old"
