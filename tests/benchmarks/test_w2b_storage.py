"""benchmarks/w2b_storage.py without a GPU: every expansion in the simulation, the packing, the
counts and the model from made-up code.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gemm_timing, w2b_storage
from benchmarks.gemm_model import GPUS
from benchmarks.w2b_model import KERNELS, Cost, expansion_cost, expansions, predict, rest_cost
from benchmarks.w2b_packing import LEVELS, STORAGES, Storage, seven_bits
from benchmarks.w2b_storage import Expander, check
from plugins.errors import CheckError, UserError
from plugins.tools.sass import Loop

NAMED = {storage.name: storage for storage in STORAGES}
KEPT = sorted((Path(w2b_storage.__file__).parent / "results").glob("w2b-storage-model-*.json"))[-1]


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def expander(request: pytest.FixtureRequest) -> Expander:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device visible to torch")
    return Expander(request.param)


def every_triple(storage: Storage) -> np.ndarray:
    """Codes of 125 rows in which every place of three codes that are stored together holds all
    their 125 values.
    """
    codes = np.zeros((125, 1, 32, storage.registers, 4), np.uint8)
    if storage.name == "base5":
        digits = np.moveaxis(codes.reshape(125, 32, 4, 8, 3, 4), 4, -1)
    else:  # for the planes any three registers
        digits = np.moveaxis(
            codes[:, :, :, : storage.registers // 24 * 24].reshape(125, 32, -1, 3, 8, 4), 3, -1
        )
    assert np.shares_memory(digits, codes)
    places = int(np.prod(digits.shape[1:-1]))
    v = (np.arange(125)[:, None] + 7 * np.arange(places)).reshape(digits.shape[:-1]) % 125
    for digit, of_one in enumerate((25, 5, 1)):
        digits[..., digit] = v // of_one % LEVELS
    return codes


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_every_three_codes_in_every_place(expander: Expander, storage: Storage) -> None:
    codes = every_triple(storage)
    check(expander, storage, codes, storage.pack(codes))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_random_rows_and_packing(expander: Expander, storage: Storage) -> None:
    codes = storage.random_codes(11, 3, seed=5)
    packed = storage.pack(codes)
    assert packed.shape == (11, 3, storage.parts, 32, 4)
    assert packed.nbytes * 8 == pytest.approx(storage.bits * codes.size)
    np.testing.assert_array_equal(storage.unpack(packed), codes)
    check(expander, storage, codes, packed)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_one_wrong_bit_is_noticed(expander: Expander, storage: Storage) -> None:
    codes = storage.random_codes(2, 1, seed=6)
    packed = storage.pack(codes)
    packed[1, 0, 2, 9, 3] ^= 1 << 18
    with pytest.raises(
        CheckError,
        match=rf"w2b_storage {storage.name}: got \d+ wrong codes of {codes.size}, the first at \[1, 0, 9, ",
    ):
        check(expander, storage, codes, packed)


def test_seven_bits_hold_every_three_codes_once() -> None:
    numbers = {
        seven_bits(a, b, c) for a in range(LEVELS) for b in range(LEVELS) for c in range(LEVELS)
    }
    assert len(numbers) == 125
    assert max(numbers) < 128
    assert seven_bits(1, 2, 3) == 0b0_01_10_11
    assert seven_bits(4, 2, 3) == 0b1_11_10_10  # a is 4, c in its place


def test_weights_of_two_and_a_third_bits() -> None:
    assert [storage.bits for storage in STORAGES] == pytest.approx([3, 3, 7 / 3, 7 / 3])


def loop(first: int, last: int, kernel: str = "gemm<AbqInt8<4> >", **counts: int) -> Loop:
    return Loop("sm_80", kernel, first, last, Counter(counts))


def test_instructions_are_counted_as_often_as_they_run() -> None:
    chunk = loop(100, 300, IMMA=8, LOP3=40, SHF=16, IMAD=16)  # 80, of which 56 expand 16 registers
    stage = loop(50, 400, IADD3=24, BRA=4, IMAD=36)
    copies = loop(60, 90, LDGSTS=2, ISETP=6)
    outside = loop(500, 900, LOP3=1000)
    cost = rest_cost([copies, chunk, stage, outside], "sm_80", KERNELS[0])
    assert cost == Cost(
        issued=(4 * 24 + 64 + 3 * 8) / 64,
        logic=(4 * 8 + 24 + 3 * 6) / 64,
        multiply=(4 * 8 + 36) / 64,
    )
    with pytest.raises(
        UserError,
        match="int8 64x8 on sm_80: got 1 loops, expected one with IMMA that copies or lies in",
    ):
        rest_cost([chunk], "sm_80", KERNELS[0])
    unrolled = loop(
        50, 400, IMMA=32, LOP3=160, SHF=64, IMAD=64, LDGSTS=8
    )  # the four chunks of a stage
    assert rest_cost([unrolled], "sm_80", KERNELS[0]) == Cost(
        issued=(4 * 24 + 8) / 64, logic=4 * 8 / 64, multiply=4 * 8 / 64
    )
    pair, around = (
        loop(*span, "gemm<AbqBinary<4> >", **counts)
        for span, counts in (((0, 9), {"BMMA": 64}), ((0, 20), {"SHF": 128}))
    )
    assert rest_cost([pair, around], "sm_80", KERNELS[1]) == Cost(2.0, 1.0, 0.0)


def test_bit_counting_reads_planes_without_codes() -> None:
    costs = {
        "planes": Cost(3.75, 3.25, 0.5),
        "planes3": Cost(3.5, 3, 0.5),
        "base5": Cost(5, 3, 2),
        "planes7": Cost(4.5, 4, 0.5),
    }
    assert expansions(KERNELS[0], costs) == costs
    assert expansions(KERNELS[1], costs) == {"planes": Cost(0, 0, 0), "planes7": Cost(1, 1, 0)}


def test_expansion_is_what_the_streaming_loop_does_besides_loads_and_products() -> None:
    kernel = "w2b::stream_kernel<w2b::Planes>"
    one = loop(0, 9, kernel, IDP=64, LDG=6, IADD3=2, LOP3=128, SHF=64, IMAD=32)
    assert expansion_cost([one], "sm_80", NAMED["planes"]) == Cost(3.5, 3.0, 0.5)
    with pytest.raises(UserError) as error:
        expansion_cost([loop(0, 9, kernel, IDP=32)], "sm_80", NAMED["planes"])
    assert str(error.value) == (
        f"{kernel} on sm_80: got loops that consume [32] registers, expected [64]. "
        "Count its instructions by hand: cuobjdump -sass."
    )


def test_the_slowest_resource_is_the_prediction() -> None:
    l4 = GPUS["l4"]
    row = predict(l4, 3, Cost(8, 4, 1))
    assert (row["memory"], row["binding"], row["us"]) == (
        3333.3,
        "memory",
        3333.3,
    )  # 1 GB at 300 GB/s
    cycles = 58 * 2040  # multiprocessor cycles of a microsecond
    assert row["issue"] == pytest.approx(8e9 / 3 / 4 * 8 / 128 / cycles, abs=0.06)
    assert row["logic"] == row["issue"]  # half as many, on a pipe half as wide
    assert predict(l4, 3, Cost(8, 64, 1))["binding"] == "logic"


@pytest.mark.slow
def test_the_command_checks_and_writes_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it measures where there is a GPU")
    assert w2b_storage.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "4 expansions compared with numpy on cpu, all right" in printed
    assert "MODEL, not measured" in printed
    [path] = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == f"w2b-storage-model-{result['date']}.json"
    assert result["note"] == "a model: nothing in this file was measured"
    rows = {(row["gpu"], row["kernel"], row["storage"]): row for row in result["rows"]}
    int8 = [(gpu, "int8 64x8", name) for gpu in GPUS for name in NAMED]
    assert set(rows) == {
        *int8,
        *(
            (gpu, "b1 64x8", name)
            for gpu in ("a100", "rtx-4090", "l4")
            for name in ("planes", "planes7")
        ),
    }
    for of_arch in result["instructions_for_4_weights"]["expansion_to_codes"].values():
        assert of_arch["planes"]["issued"] < 3.6
        assert of_arch["planes3"]["issued"] < 3.2
        assert of_arch["base5"]["issued"] < 5.2  # what docs/kernels.md says of them
        assert of_arch["planes7"]["issued"] < 4.0
    for gpu, kernel, storage in (
        ("l4", "int8 64x8", "base5"),
        ("rtx-4090", "int8 64x8", "planes7"),
        ("a100", "b1 64x8", "planes7"),
    ):
        row = rows[gpu, kernel, storage]
        assert (row["binding"], row["speedup"]) == ("memory", pytest.approx(9 / 7, abs=0.01))
        assert row["instruction_share"] < 0.5
    kept = json.loads(KEPT.read_text())["instructions_for_4_weights"][
        "rest_of_the_gemm"
    ]  # docs/kernels.md has these numbers
    for arch, of_arch in result["instructions_for_4_weights"]["rest_of_the_gemm"].items():
        assert of_arch["int8 64x8"]["issued"] == pytest.approx(
            kept[arch]["int8 64x8"]["issued"], rel=0.1
        )
    assert rows["h200", "int8 64x8", "base5"]["instruction_share"] > 0.9


def test_measured_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of a GPU's numbers into the file, with the simulation for the GPU and a clock that
    says how many bytes a pass read.
    """
    passes: list[tuple[str, int]] = []

    def run(
        storage: Storage,
        packed: torch.Tensor,
        against: torch.Tensor,
        out: torch.Tensor,
        stream: int = 0,
    ) -> None:
        passes.append((storage.name, packed.numel() * 4))
        Expander.run(simulation, storage, packed, against, out, stream)

    def time_calls(call: Any, budget: float, copies: int = 1) -> gemm_timing.Time:
        assert copies == 2  # all of them: fewer would stay in the cache
        for i in range(3):
            call(i, 0)
        return gemm_timing.Time(passes[-1][1] / 1000, 0.5, 3)

    simulation = Expander("cpu")
    fake: Any = SimpleNamespace(device="cpu", tensor=simulation.tensor, run=run)
    monkeypatch.setattr(gemm_timing, "time_calls", time_calls)
    monkeypatch.setattr(gemm_timing, "copies_for", lambda size: 2)
    monkeypatch.setattr(gemm_timing, "copy_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name="Some GPU", major=8, minor=9, multi_processor_count=58),
    )
    args: Any = SimpleNamespace(rows=5, codes=24576, seconds=1, results=tmp_path)
    path = w2b_storage._measure(fake, args)
    result = json.loads(path.read_text())
    assert path.name == f"w2b-storage-some-gpu-{result['date']}.json"
    assert [row["storage"] for row in result["rows"]] == list(NAMED)
    assert [row["speedup"] for row in result["rows"]] == pytest.approx(
        [1, 1, 9 / 7, 9 / 7], abs=0.001
    )
    assert {row["gb_per_s"] for row in result["rows"]} == {1.0}  # 1000 bytes of a microsecond
    assert "7 bits, multiplied" in capsys.readouterr().out


def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert w2b_storage.main(["--codes", "100"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == "--codes: got 100, expected a multiple of 24576. Give whole steps of every storage."
    )
    assert w2b_storage.main(["--results", "nowhere"]) == 2
    assert (
        "nowhere: got no such folder, expected one for the result file" in capsys.readouterr().err
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # holds no compiler
    assert w2b_storage.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == (
        f"CUDA_HOME: got {tmp_path}, expected a CUDA toolkit: bin/nvcc, headers, "
        "libcudart_static.a. Correct or unset the variable."
    )
