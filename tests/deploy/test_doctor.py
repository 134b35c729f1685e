"""What a machine has and can do: gaps come with what mends them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deploy import doctor
from deploy.__main__ import main
from deploy.doctor import Finding, findings
from plugins import cores
from plugins.cores import usable_cores

EVERYTHING = {
    "GPU": "compute capability 8.9",
    "tensorrt": "",
    "tensorrt_rtx": "1.7.1.116",
    "polygraphy": "0.53",
    "onnxruntime": "1.31",
    "torch": "2.13",
    "nvcc": "release 13.0",
    "g++": "/usr/bin/g++",
    "native kernels": "",
    "trtexec": "/opt/trtexec",
}


def abilities(**changes: str) -> dict[str, str]:
    parts = {
        name: Finding("has", name, found, f"get {name}")
        for name, found in {**EVERYTHING, **changes}.items()
    }
    return {item.name: item.found or item.fix for item in doctor._abilities(parts)}


def test_what_the_parts_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.engine.edition.gpu_capabilities", lambda: ["8.9"])
    assert set(abilities().values()) == {"yes"}
    without = abilities(GPU="")
    assert {name for name, state in without.items() if state == "no GPU: get GPU"} == {
        "run an engine",
        "prove an engine",
        "time with trtexec",
    }
    assert abilities(nvcc="")["build an engine"] == "no nvcc: get nvcc"
    assert abilities(**{"g++": ""})["run with native kernels"] == "no g++: get g++"
    assert abilities(**{"g++": "", "native kernels": "a.so"})["run with native kernels"] == "yes"
    assert abilities(onnxruntime="")["prove an export"] == "no onnxruntime: get onnxruntime"
    assert abilities(tensorrt="11.0", tensorrt_rtx="")["run an engine"] == "yes"


def test_a_gpu_that_the_edition_does_not_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.engine.edition.gpu_capabilities", lambda: ["9.0"])
    found = abilities(GPU="compute capability 9.0")
    assert found["run an engine"].startswith("got a GPU of compute capability 9.0, which ")
    assert found["build an engine"] == found["prove an export"] == "yes"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert found["torch"]["ok"] and found["onnxruntime"]["found"].count(".") == 2
    assert all(item["ok"] or item["fix"] for item in found.values())
    assert f"{os.cpu_count()} threads to be used" in found["CPU"]["found"] or (
        f"{usable_cores()} of {os.cpu_count()} threads to be used" in found["CPU"]["found"]
    )
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) and lines[0].startswith("has  GPU ")


def test_a_package_whose_import_fails_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_runtime.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._version("broken_runtime") == ""


def test_what_a_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for module in (doctor, cores):
        monkeypatch.setattr(module, "allowed_memory", lambda *_: 10**6)
    assert ", 3 of 64 threads to be used; " in doctor._cpu()
    assert doctor._memory() == "0.0 GB free, as a control group allows"
    for module in (doctor, cores):
        monkeypatch.setattr(module, "allowed_memory", lambda *_: 10**18)
    assert not doctor._memory().endswith("allows")


def test_the_driver(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    assert doctor._driver_version(file) == "580.95.05"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\n")
    assert doctor._driver_version(file) == "535.129.03"
    assert doctor._driver_version(tmp_path / "none") == ""


def test_a_bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from plugins.errors import InputError

    def no_cuda() -> None:
        raise InputError("CUDA compiler", "got no nvcc, expected one", "Get one")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("plugins.tools.toolkit.find_cuda", no_cuda)
    monkeypatch.setattr("plugins.tools.build.build_folders", lambda: [tmp_path])
    monkeypatch.setattr(doctor, "_version", lambda module: "")
    monkeypatch.setattr("exporter.engine.edition.gpu_capabilities", lambda: [])
    found = {item.name: item for item in findings(tmp_path)}
    there = {name for name, item in found.items() if item.ok}
    assert there == {"CPU", "memory", "disk"}
    assert found["nvcc"].fix == "Get one"
    assert found["native kernels"].fix == "python -m plugins cpu"
    assert found["quantize and export"].fix == "no torch: pip install torch==2.13.0"
