"""Finding a CUDA compiler, compiling only when something changed, and errors that say what to do."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins.errors import InputError, UserError
from plugins.tools import build, toolkit
from plugins.tools.sass import _cuobjdump

PLUGINS = Path(__file__).parents[3] / "plugins"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that builds into its own folder."""
    copy = tmp_path / "plugins"
    shutil.copytree(PLUGINS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(build, "_SOURCES", copy)
    return copy


@pytest.fixture
def small_sources(sources: Path) -> Path:
    """The same with one small kernel file that includes a header, in place of all kernels."""
    for kernels in (*sources.glob("*/cuda/*.cu"), *sources.glob("core/host/*.cu")):
        kernels.unlink()
    (sources / "abq_gemm" / "cuda" / "launch.cu").write_text(
        '#include "core/host/params.h"\nANYBIT_API int answer() { return 42; }\n'
    )
    return sources


def test_unchanged_sources_are_not_compiled_again(
    small_sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = small_sources
    library = build.build_sim()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "compiling libanybit_kernels_sim.so, which takes up to a minute and is done once"
    )
    assert len(said) == 2 and re.fullmatch(r"compiled libanybit_kernels_sim.so in \d+ s", said[1])
    first = library.stat().st_mtime_ns
    assert library == sources.parent / "build" / "libanybit_kernels_sim.so"
    assert build.build_sim().stat().st_mtime_ns == first
    assert capsys.readouterr().err == ""
    header = sources / "core" / "host" / "params.h"
    header.write_text(header.read_text() + "// changed\n")
    (left := library.parent / ".build-killed").mkdir()  # with what a killed build had made
    (left / "a.o").write_bytes(b"")
    assert build.build_sim().stat().st_mtime_ns != first
    assert sorted(path.name for path in library.parent.iterdir()) == [
        ".lock",
        "libanybit_kernels_sim.json",
        "libanybit_kernels_sim.so",
    ]


# Root may write anywhere; without these capabilities it is as anybody.
PLAIN_ROOT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]


def build_sim_as_anybody(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m plugins sim` of the copy in `folder`, by one who may write only what its owner may."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root without setpriv (util-linux) may write everywhere")
    return subprocess.run(
        [*(PLAIN_ROOT if os.geteuid() == 0 else []), sys.executable, "-m", "plugins", "sim"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        if path.is_file()
    }


def test_somebody_elses_folder_is_read_and_the_cache_is_written(
    small_sources: Path, tmp_path: Path
) -> None:
    """The digest is looked at before any lock is taken; what is not up to date is made in the
    user's cache, and where that cannot be written either, one message says so.
    """
    home, cache = tmp_path, tmp_path / "cache"
    own = home / "build"
    build.build_sim()
    before = tree(own)
    own.chmod(0o555)
    try:
        done = build_sim_as_anybody(home, XDG_CACHE_HOME=str(cache))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{own / build.SIM_LIBRARY}\n" and not cache.exists()
        header = small_sources / "core" / "host" / "params.h"
        header.write_text(header.read_text() + "// changed\n")
        for lines in (2, 0):  # about compiling
            done = build_sim_as_anybody(home, XDG_CACHE_HOME=str(cache))
            assert (done.returncode, len(done.stderr.splitlines())) == (0, lines)
            assert done.stdout == f"{cache / 'anybit-trt' / build.SIM_LIBRARY}\n"
        shutil.rmtree(cache)
        cache.touch()
        done = build_sim_as_anybody(home, XDG_CACHE_HOME=str(cache))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"{build.SIM_LIBRARY}: got no folder that can be written ({own}: Permission denied; "
            f"{cache / 'anybit-trt'}: Not a directory), expected one to compile it in. Set "
            "XDG_CACHE_HOME to a folder of your own.\n"
        )
        assert tree(own) == before
    finally:
        own.chmod(0o755)


def test_a_lock_of_somebody_else_is_no_reason_to_stop(small_sources: Path, tmp_path: Path) -> None:
    """In a shared folder that all may write."""
    build.build_sim()
    header = small_sources / "core" / "host" / "params.h"
    header.write_text(header.read_text() + "// changed\n")
    lock = tmp_path / "build" / ".lock"
    lock.unlink()
    lock.symlink_to(tmp_path / "target")
    assert build_sim_as_anybody(tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache")).stdout == (
        f"{tmp_path / 'cache' / 'anybit-trt' / build.SIM_LIBRARY}\n"
    )
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("variable", ["", "relative/cache"])
def test_where_libraries_may_be(
    sources: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    own = sources.parent / "build"
    assert build.build_folders() == [own, Path.home() / ".cache" / "anybit-trt"]
    (sources.parent / "pyproject.toml").unlink()  # installed, not a checkout
    assert build.build_folders() == [Path.home() / ".cache" / "anybit-trt"]

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert build.build_folders() == []


def test_a_failed_build_keeps_library_and_record(
    small_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the run after it finds what there was before."""
    library = build.build_sim()
    header, folder = small_sources / "core" / "host" / "params.h", library.parent
    before, good = tree(folder), header.read_text()
    header.write_text(good + "#error broken\n")
    with pytest.raises(UserError, match="broken"):
        build.build_sim()
    header.write_text(good + "// changed\n")
    link = build._link_sim
    monkeypatch.setattr(build, "_link_sim", lambda: [*link(), "-lnowhere"])
    with pytest.raises(UserError, match="nowhere"):
        build.build_sim()
    monkeypatch.setattr(build, "_link_sim", link)
    header.write_text(good)
    assert tree(folder) == before
    assert build.build_sim() == library and tree(folder) == before


def test_a_folder_for_temporary_files_that_is_not_there_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc fails without TMPDIR: even where it is asked only where its toolkit is."""
    sources = tmp_path / "plugins"
    (sources / "op" / "cuda").mkdir(parents=True)
    (sources / "core").mkdir()
    kernel = sources / "op" / "cuda" / "one.cu"
    kernel.write_text('extern "C" __global__ void one(int* out) { *out = 1; }\n')
    for file in ("build_flags.json", "core/exports.map"):
        shutil.copy(PLUGINS / file, sources / file)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(build, "_SOURCES", sources)
    library = build.build_library("80")
    before = tree(library.parent)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert build.build_library("80") == library and tree(library.parent) == before
    kernel.write_text(kernel.read_text() + "// changed\n")
    assert build.build_library("80") == library
    after = tree(library.parent)
    assert after.keys() == before.keys() and after[library.name] != before[library.name]


@pytest.mark.parametrize("text", ["", "[1]", '{"digest": 3}', "{"])
def test_a_damaged_record_is_none(small_sources: Path, text: str) -> None:
    library = build.build_sim()
    note = library.with_suffix(".json")
    whole = note.read_text()
    note.write_text(text)
    build.build_sim()
    assert json.loads(note.read_text())["digest"] == json.loads(whole)["digest"]


def test_a_build_depends_on_what_it_is_made_from(sources: Path) -> None:
    """Nothing of the self-test is in the kernels, no launcher of a kernel in the self-test, and
    TensorRT's headers in the plugins only.
    """
    made = (
        build._sources(*build.KERNEL_SOURCES),
        build._sources(*build.SELFTEST_SOURCES),
        build._sources(*build.PLUGIN_SOURCES),
    )

    def digests() -> list[str]:
        compiles = [{source: ["g++"] for source in sources} for sources in made]
        return [build._recipe("out", each, ["{}"]).digest() for each in compiles]

    def changed(file: str) -> tuple[bool, ...]:
        before = digests()
        (sources / file).write_text((sources / file).read_text() + "// changed\n")
        return tuple(old != new for old, new in zip(before, digests(), strict=True))

    assert changed("selftest/layer.cpp") == (False, True, False)
    assert changed("selftest/device.h") == (False, True, False)
    assert changed("abq_gemm/selftest.cpp") == (False, True, False)
    assert changed("core/host/measured.inc") == (True, False, False)
    assert changed("abq_gemm/cuda/int8.cuh") == (True, False, False)
    assert changed("core/host/params.h") == (True, True, True)
    assert changed("core/tensorrt/abi/logger.h") == (False, False, True)
    assert changed("core/tensorrt/abi/NvInferRuntime.h") == (
        False,
        False,
        True,
    )  # included as <NvInferRuntime.h>
    (sources / "core" / "host" / "vector").write_text(
        "// beside headers that include <vector>, where a compiler does not look for it\n"
    )
    assert changed("core/host/vector") == (False, False, False)


def test_9_0_gets_all_its_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for 90a, and PTX that later GPUs take: of the last architecture, in its general
    form.
    """
    assert build._gencode(["90"]) == build._gencode(["90a"]) == build._gencode(["90", "90a"])
    assert build._gencode(["90a", "80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    (tmp_path / "plugins" / "op" / "cuda").mkdir(parents=True)
    (tmp_path / "plugins" / "core").mkdir()
    (tmp_path / "plugins" / "op" / "cuda" / "one.cu").write_text(
        'extern "C" __global__ void one(int* out) { *out = 1; }\n'
    )
    for file in ("build_flags.json", "core/exports.map"):
        shutil.copy(PLUGINS / file, tmp_path / "plugins" / file)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(build, "_SOURCES", tmp_path / "plugins")
    library = build.build_library("90")
    listed = subprocess.run(
        [_cuobjdump(), "-lelf", "-lptx", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "sm_90a.cubin" in listed
    assert "sm_90.cubin" not in listed
    assert "sm_90.ptx" in listed


def test_compiler_output_is_shown_and_the_old_library_stays(small_sources: Path) -> None:
    library = build.build_sim()
    before = library.read_bytes()
    (small_sources / "abq_gemm" / "cuda" / "launch.cu").write_text("#error this kernel is broken\n")
    with pytest.raises(UserError, match="#error this kernel is broken") as caught:
        build.build_sim()
    assert caught.value.where == "abq_gemm/cuda/launch.cu"
    assert library.read_bytes() == before


def test_bad_architecture() -> None:
    with pytest.raises(InputError) as caught:
        build.build_library("sm_80")
    assert str(caught.value) == (
        "--arch: got 'sm_80', expected all, or compute capabilities such as 80;90. "
        "Give the capabilities without dots, separated by semicolons."
    )


def test_bad_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(InputError) as caught:
        toolkit.find_cuda()
    assert str(caught.value) == (
        f"CUDA_HOME: got {tmp_path}, expected a CUDA toolkit: bin/nvcc, headers, "
        f"libcudart_static.a. "
        "Correct or unset the variable."
    )


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away CUDA_HOME and every program on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolkit.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("bare")
def test_wheels_are_found_without_a_toolkit() -> None:
    if toolkit._wheel_root() is None:
        pytest.skip("the CUDA wheels are not installed")
    cuda = toolkit.find_cuda()
    assert cuda.nvcc.parts[-4:] == ("nvidia", "cu13", "bin", "nvcc")
    assert (cuda.include / "cuda_fp16.h").is_file()
    assert (cuda.lib / "libcudart_static.a").is_file()
    assert "release" in cuda.version()


@pytest.mark.usefixtures("bare")
def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "_wheel_root", lambda: None)
    with pytest.raises(InputError) as caught:
        toolkit.find_cuda()
    assert str(caught.value) == (
        "CUDA compiler: got no nvcc from CUDA_HOME, PATH or the wheels, expected one. Install "
        "the project's requirements "
        "(pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm "
        "nvidia-cuda-cccl) or set CUDA_HOME to a "
        "CUDA toolkit."
    )


@pytest.mark.usefixtures("bare")
def test_no_host_compiler() -> None:
    with pytest.raises(InputError) as caught:
        toolkit.find_program("g++", "g++")
    assert (
        str(caught.value)
        == "g++: got no such program on PATH, expected it. Install it, such as: apt-get install g++."
    )


def test_soname_makes_a_versioned_library_resolvable(sources: Path) -> None:
    folder = sources.parent
    source, real = folder / "answer.c", folder / "libanswer.so.1"
    source.write_text("int answer(void) { return 42; }\n")
    subprocess.run(
        [
            "g++",
            "-x",
            "c",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libanswer.so.1",
            str(source),
            "-o",
            str(real),
        ],
        check=True,
    )
    alias = build.build_soname(real, "libanswer.so")
    assert alias.name == "libanswer.so"
    code = (
        f"import ctypes\nctypes.CDLL({str(alias)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "print(ctypes.CDLL('libanswer.so').answer())"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "42\n"
    )
    with pytest.raises(OSError):
        ctypes.CDLL("libanswer.so")  # only that process knows the name


def test_command_line_reports_bad_input(
    run_module: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = run_module("plugins", "build", "--arch", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "--arch: got 'x', expected all, or compute capabilities such as 80;90. "
        "Give the capabilities without dots, separated by semicolons.\n"
    )


def test_a_made_library_needs_no_compiler(
    sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in sources.rglob("*.cpp"):
        path.unlink()
    (sources / "core/onnxruntime/one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (sources / "core/host/ops.cu").write_text("")
    library = build.build_onnxruntime()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.build_onnxruntime() == library
    (sources / "core/onnxruntime/one.cpp").write_text('extern "C" int one() { return 2; }\n')
    with pytest.raises(InputError) as error:
        build.build_onnxruntime()
    assert str(error.value) == (
        "g++: got no such program on PATH, expected it. Install it, such as: apt-get install g++."
    )
