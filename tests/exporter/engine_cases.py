"""An engine.json as a test needs one."""

from __future__ import annotations

from typing import Any

__all__ = ["ENGINE"]


def _profile(name: str) -> dict[str, Any]:
    ids = {"min": [1, 1], "opt": [1, 4], "max": [2, 8]}
    key = {"min": [1, 2, 0, 4], "opt": [1, 2, 4, 4], "max": [2, 2, 8, 4]}
    inputs = {"input_ids": ids, "logits_indices": ids, "past_key_values.0.key": key}
    return {"name": name, "inputs": inputs}


ENGINE: dict[str, Any] = {
    "format": 1,
    "edition": "tensorrt-rtx",
    "version": "1.7.1.116",
    "compute_capabilities": [],
    "profiles": [_profile("prefill"), _profile("decode")],
    "layers": {"PLUGIN_V3": 8},
    "custom_nodes": {"ABQGemm": 8},
    "decomposable_attention": False,
    "parse_seconds": 0.5,
    "build_seconds": 2,
    "bytes": 1000,
    "plugin_library": {"name": "libanybit_plugins.so", "sha256": 64 * "0"},
}
