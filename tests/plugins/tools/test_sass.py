"""The machine code of the plugin library that the install built: what every kernel is for is in it,
and nothing that it must not have.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from plugins import __main__ as command
from plugins.errors import InputError, UserError
from plugins.tools.build import build_library, build_source
from plugins.tools.sass import FAMILIES, Kernel, failures, inspect, loops, table
from plugins.tools.toolkit import find_cuda

SPILLING = """
extern "C" __global__ void gemm(int *out, int n) {  // an array with run-time indices lies in local memory
  int kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = out[i] * n;
  for (int i = 0; i < n; ++i) kept[kept[i] & 63] += i;
  for (int i = 0; i < 64; ++i) out[i] = kept[(i * n) & 63];
}
"""

NESTED = """
extern "C" __global__ void nested(unsigned *out, int outer, int inner) {
  unsigned sum = 0;
#pragma unroll 1
  for (int i = 0; i < outer; ++i) {
#pragma unroll 1
    for (int j = 0; j < inner; ++j) sum += __popc(out[j] ^ sum);
    __syncthreads();
  }
  out[0] = sum;
}
"""


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return inspect(build_library())


@pytest.mark.slow
def test_library_passes(
    kernels: list[Kernel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures(kernels, build_library().stat().st_size) == []
    inspected: list[Path] = []
    monkeypatch.setattr(command, "inspect", lambda library: inspected.append(library) or kernels)
    assert command.main(["sass"]) == 0
    assert inspected == [build_library()]
    assert "all checks passed" in capsys.readouterr().out


@pytest.mark.slow
def test_every_family_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    assert {(kernel.arch, kernel.family) for kernel in kernels} >= {
        (arch, family) for arch in ("sm_80", "sm_90a") for family in FAMILIES
    }
    stubs = [kernel for kernel in kernels if "wgmma" in kernel.family and kernel.arch == "sm_80"]
    assert len(stubs) > 10
    assert all(kernel.code < 512 for kernel in stubs)
    assert len(table(kernels).splitlines()) == len(kernels) + 1


def test_faults_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, library = tmp_path / "spill.cu", tmp_path / "spill.o"
    source.write_text(SPILLING)
    cuda = find_cuda()
    target = ["-gencode=arch=compute_80,code=sm_80", f"-I{cuda.include}"]
    subprocess.run([str(cuda.nvcc), *target, "-c", str(source), "-o", str(library)], check=True)
    [kernel] = inspect(library)
    assert (kernel.arch, kernel.name) == ("sm_80", "gemm")
    assert kernel.counts["LDL"] > 0
    assert kernel.counts["STL"] > 0
    assert any("bytes of stack" in line for line in failures([kernel]))
    assert command.main(["sass", str(library)]) == 3
    assert "sm_80: got no kernel of family abq int8, expected some" in capsys.readouterr().out


def test_instructions_belong_to_the_innermost_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.tools.build.build_folders", lambda: [tmp_path])
    source = tmp_path / "nested.cu"
    source.write_text(NESTED)
    library = build_source(source, "80;90a")
    assert library == build_source(source, "80;90a") == tmp_path / "nested-80-90a.so"
    for arch in ("sm_80", "sm_90a"):
        mine = [loop for loop in loops(library) if loop.arch == arch]
        assert {loop.kernel for loop in mine} == {"nested"}
        [inner] = [loop for loop in mine if loop.counts["POPC"]]
        outer = [loop for loop in mine if inner.within(loop)]
        assert [loop.counts["POPC"] for loop in outer] == [0]
        assert outer[0].counts["BAR"] == 1
        assert not outer[0].within(inner)


def test_source_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.tools.build.build_folders", lambda: [tmp_path])
    source = tmp_path / "broken.cu"
    source.write_text("no C++")
    with pytest.raises(UserError, match=r"broken.cu: got exit code \d+ from .*nvcc, expected 0"):
        build_source(source, "80")
    with pytest.raises(
        InputError, match="--arch: got 'sm_80', expected all, or compute capabilities"
    ):
        build_source(source, "sm_80")


def test_missing_instructions_and_sizes_are_found() -> None:
    name = "gemm<AbqInt8<2, 4, false, TileShape<8, 1, 8, 2, 3> > >"
    kernel = Kernel("sm_80", name, registers=300, counts=Counter({"LDGSTS.128": 1, "LDSM": 1}))
    found = failures([kernel], 61 << 20)
    assert "library: got 63963136 bytes, expected at most 62914560" in found
    assert f"sm_80 {name}: got no IMMA, expected int8 tensor cores" in found
    assert f"sm_80 {name}: got 300 registers x 256 threads, expected at most 65536" in found
    name = (
        "gemm_warpgroups<QqqWarpgroup<ChannelWeights, WarpgroupShape<TileShape<8, 2, 8, 2, 3> > > >"
    )
    kernel = Kernel(
        "sm_90a",
        name,
        registers=176,
        counts=Counter({"IGMMA": 8, "WARPGROUP": 8, "UBLKCP": 2, "USETMAXREG": 2}),
    )
    assert [line.partition("> >: ")[2] for line in failures([kernel]) if "Warpgroup" in line] == [
        "got 176 registers x 384 threads, expected at most 65536",
        "got 8 waits and fences for 8 IGMMA, expected fewer: the compiler lets each wait for "
        "the one before",
        "got no LDS.64, expected pairs of packed words",
    ]
    assert [line for line in failures([Kernel("sm_80", name)]) if "Warpgroup" in line] == []


def test_no_such_library() -> None:
    with pytest.raises(InputError) as error:
        inspect(Path("nowhere.so"))
    assert (
        str(error.value)
        == "nowhere.so: got no such file, expected a kernel library. Build it: python -m "
        "plugins build."
    )
