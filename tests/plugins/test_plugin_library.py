"""The compiled plugin library: what it exports and needs, and that a real TensorRT loads it and
makes both plugins.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from plugins import op_names
from plugins.core.op_spec import GemmAttributes
from plugins.errors import InputError
from plugins.tools.build import build_library
from plugins.tools.kernels import GemmShape, KernelLibrary
from tests.real_tensorrt import RealTensorrt, showing

REGISTRY = Path(__file__).parent / "trt" / "registry.py"
ABQ = GemmAttributes(
    wbits=4,
    levels=16,
    abits=8,
    act_symmetric=0,
    group_size=32,
    in_features=64,
    out_features=48,
    has_bias=1,
)
QQQ = dataclasses.replace(ABQ, act_symmetric=1, group_size=0, has_bias=0)

RANGE = "Export the model again with settings in range."
VERSION = "Export the model again with this version."
BAD: list[tuple[str, dict[str, float], str]] = [  # op, changed attributes, error
    ("ABQGemm", {"wbits": 9}, f"got wbits 9, expected 1 to 8. {RANGE}"),
    (
        "ABQGemm",
        {"levels": 5},
        f"got levels 5 with wbits 4, expected 16, or 5 with 2 bits, or 3 with 1 bit. {RANGE}",
    ),
    ("ABQGemm", {"abits": 9}, f"got abits 9, expected 2 to 8, or 16 for weight-only. {RANGE}"),
    ("ABQGemm", {"abits": 1}, f"got abits 1, expected 2 to 16. {RANGE}"),
    ("ABQGemm", {"has_bias": 2}, f"got has_bias 2, expected 0 to 1. {RANGE}"),
    ("ABQGemm", {"in_features": 0}, f"got in_features 0, expected 1 to 2147483647. {RANGE}"),
    (
        "ABQGemm",
        {"group_size": 48},
        "got group_size 48, expected a divisor of in_features 64. "
        "Choose a --group-size that divides every layer's input size.",
    ),
    (
        "ABQGemm",
        {"group_size": 0, "in_features": 1 << 21},
        "got sums of up to 4026531840, expected less than 2^31. Use a smaller --group-size.",
    ),
    (
        "ABQGemm",
        {"wbits": (1 << 33) + 4},
        f"got wbits 8589934596, expected a 32-bit integer. {VERSION}",
    ),
    (
        "QQQGemm",
        {"wbits": 3, "levels": 8},
        "got wbits 3, levels 8, abits 8, act_symmetric 1, expected 4, 16, 8, 1. "
        "Use ABQGemm for other bit widths.",
    ),
    (
        "QQQGemm",
        {"group_size": 32},
        "got group_size 32, expected 0 (per channel), 64 or 128. "
        "Choose one of these, or --method abq.",
    ),
    (
        "QQQGemm",
        {"in_features": 1 << 18},
        "got in_features 262144, whose integer sum overflows 32 bits. "
        "Use ABQGemm with groups for this layer.",
    ),
    (
        "QQQGemm",
        {"norm_epsilon": -0.5},
        f"got norm_epsilon -0.5, expected 0 (no norm) or a positive number. {VERSION}",
    ),
    (
        "ABQGemm",
        {"norm_epsilon": float("inf")},
        f"got norm_epsilon inf, expected 0 (no norm) or a positive number. {VERSION}",
    ),
    (
        "ABQGemm",
        {"norm_epsilon": 1},
        f"got 1 values of field type 10, expected one float in attribute 'norm_epsilon'. {VERSION}",
    ),
]


def request(op: str, dtype: str = "int64", **changes: Any) -> dict[str, Any]:
    """What registry.py makes a plugin from; a value of None leaves the field out."""
    fields = {**(ABQ if op == "ABQGemm" else QQQ).as_dict(), **changes}
    return {
        "op": op,
        "dtype": dtype,
        "fields": {name: value for name, value in fields.items() if value is not None},
    }


REQUESTS = [
    request("ABQGemm", "int32"),
    request("ABQGemm"),
    request("QQQGemm", "int32"),
    request("QQQGemm"),
    request("ABQGemm", abits=16),
    request("ABQGemm", wbits=2, levels=5),
    request("QQQGemm", in_features=128, group_size=64),
    request("ABQGemm", norm_epsilon=1e-5),
    request("QQQGemm", norm_epsilon=None),
    request("ABQGemm", has_minimum=1),
    request("ABQGemm", abits=None),
    request("ABQGemm", "float32"),
    request("ABQGemm", wbits=[4, 4]),
    *(request(op, **changes) for op, changes, _ in BAD),
]
GOOD = 10


@pytest.fixture(scope="module")
def library() -> Path:
    return build_library()


@cache
def answer(real: RealTensorrt) -> dict[str, Any]:
    """What a TensorRT makes of REQUESTS."""
    result = subprocess.run(
        [sys.executable, str(REGISTRY), str(build_library()), real.module],
        env=real.environment,
        input=json.dumps(REQUESTS),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_exports_only_its_interface(library: Path) -> None:
    output = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert sorted(line.split()[-1] for line in output.splitlines()) == [
        "anybit_ops",
        "anybit_prepare_rows",
        "anybit_prepare_tokens",
        "getCreators",
        "setLoggerFinder",
    ]


def test_exports_the_ops_that_python_knows(library: Path) -> None:
    kernels = KernelLibrary(library)
    assert kernels.ops == tuple(op_names())
    with pytest.raises(InputError) as caught:
        kernels.tactics("Gemm", GemmShape())
    assert str(caught.value) == (
        f"{library}: got no op 'Gemm', expected one of ABQGemm, QQQGemm. "
        "Build the library again: python -m plugins build."
    )


def test_needs_no_cuda_library(library: Path) -> None:
    output = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output))
    assert needed <= {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }


def test_loads_without_any_environment(library: Path) -> None:
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).anybit_ops is not None)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_BIND_NOW": "1", "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "True\n"


@pytest.mark.parametrize("real", showing("library loaded"))
def test_tensorrt_loads_the_library(real: RealTensorrt) -> None:
    assert answer(real)["version"] == real.version


@pytest.mark.parametrize("real", showing("creators found"))
def test_tensorrt_lists_both_creators(real: RealTensorrt) -> None:
    told_by_an_input = {"has_minimum"}
    names = {field.name for field in dataclasses.fields(GemmAttributes)}
    fields = sorted(names - told_by_an_input)
    creators = answer(real)["creators"]
    listed = sorted([name, version, sorted(names)] for name, version, names in creators)
    assert listed == [["ABQGemm", "1", fields], ["QQQGemm", "1", fields]]


@pytest.mark.parametrize("real", showing("plugins made"))
def test_tensorrt_makes_both_plugins(real: RealTensorrt) -> None:
    assert answer(real)["plugins"][:GOOD] == [{"made": True, "errors": []}] * GOOD


@pytest.mark.parametrize("real", showing("wrong fields refused"))
def test_bad_fields_are_logged_and_refused(real: RealTensorrt) -> None:
    errors = [
        f"got none, expected one integer in attribute 'abits'. {VERSION}",
        f"got 1 values of field type 1, expected one integer in attribute 'wbits'. {VERSION}",
        f"got 2 values of field type 10, expected one integer in attribute 'wbits'. {VERSION}",
        *(error for _, _, error in BAD),
    ]
    assert answer(real)["plugins"][GOOD:] == [
        {"made": False, "errors": [f"{request['op']} 'layer0': {error}"]}
        for request, error in zip(REQUESTS[GOOD:], errors, strict=True)
    ]
