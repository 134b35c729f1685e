"""The export as a process: what it is given for its streams, limits and encodings costs it nothing
that it has done, and it talks to nobody.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.out.manifest import read_manifest
from tests.conftest import W4A8

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def export(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """export(redirections, *more, until="quant", before="", out="out", **environment) -> exit code
    and what arrived of stdout and stderr.
    """

    def call(
        redirections: str = "",
        *more: str,
        until: str = "quant",
        before: str = ":",
        out: str = "out",
        **environment: str,
    ) -> tuple[int, str, str]:
        words = [sys.executable, "-m", "exporter", str(tiny_model_dir), *W4A8, "--method", "rtn"]
        words += ["--engine", "none", "--offline", "--until", until, "--out", str(tmp_path / out)]
        done = subprocess.run(
            ["bash", "-c", f"{before}; {shlex.join([*words, *more])} {redirections}"],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return call


FULL = "stdout: got No space left on device while writing, expected room for all of it. Files are not concerned.\n"


@pytest.mark.parametrize(
    ("redirections", "more", "told"),
    [
        (">&-", (), FULL.replace("No space left on device", "Bad file descriptor")),
        (">/dev/full", (), FULL),
        (">/dev/full", ("--progress", "json"), FULL),
        ("2>/dev/full", (), ""),
        ("<&- >&- 2>&-", (), ""),
        ("| head -1; exit ${PIPESTATUS[0]}", ("--progress", "json"), ""),
    ],
)
def test_an_export_that_succeeded_is_not_called_failed(
    export: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    redirections: str,
    more: tuple[str, ...],
    told: str,
) -> None:
    code, _, err = export(redirections, *more)
    assert code == 0 and err.endswith(told) and "Traceback" not in err
    assert list(read_manifest(tmp_path / "out" / "manifest.json")["stages"]) == ["quant"]


def test_a_table_that_cannot_be_drawn_is_escaped(
    export: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, stdout, err = export(out="modèle", PYTHONIOENCODING="ascii")
    assert code == 0 and "mod\\xe8le" in stdout and stdout.isascii() and "Traceback" not in err
    assert (tmp_path / "modèle" / "quant" / "quant.json").is_file()


def test_too_few_open_files(export: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert export(before="ulimit -n 16")[0] == 0
    code, _, err = export(before="ulimit -n 5", out="other")
    assert (code, err.splitlines()[-1]) == (
        1,
        "open files: got a limit of 5 at a time, expected more. Raise it in this shell, such as: "
        "ulimit -n 1024.",
    )
    assert "Traceback" not in err


# Logs what a process asks of the network; a socket of the machine's own (AF_UNIX) is none of it.
SHIM = r"""
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void tell(const char* what, const char* name)
{
    char line[512];
    const int length = snprintf(line, sizeof line, "%s %s\n", what, name ? name : "");
    const int file = open(getenv("NETWORK_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0 || write(file, line, length) != length) abort();
    close(file);
}

extern "C" int socket(int domain, int type, int protocol)
{
    if (domain == AF_INET || domain == AF_INET6) tell("socket", "");
    const auto real = (int (*)(int, int, int))dlsym(RTLD_NEXT, "socket");
    return real(domain, type, protocol);
}

extern "C" int getaddrinfo(const char* node, const char* service, const addrinfo* hints, addrinfo** found)
{
    tell("getaddrinfo", node);
    const auto real = (decltype(&getaddrinfo))dlsym(RTLD_NEXT, "getaddrinfo");
    return real(node, service, hints, found);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++ to compile what watches the network")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    library = folder / "shim.so"
    command = [gxx, "-shared", "-fPIC", "-o", str(library), str(folder / "shim.cpp"), "-ldl"]
    subprocess.run(command, check=True)
    return library


LOOKS_UP = "import socket\nsocket.socket()\ntry: socket.getaddrinfo('name.invalid', 1)\nexcept OSError: pass"


def test_offline_asks_nothing_of_the_network(
    export: Callable[..., tuple[int, str, str]], shim: Path, tmp_path: Path
) -> None:
    """Libraries' own habits included (ONNX Runtime 1.31 reports to its maker): no internet socket,
    no host looked up, no file left in TMPDIR.
    """
    log, temporary = tmp_path / "log", tmp_path / "tmp"
    temporary.mkdir()
    watched = {"LD_PRELOAD": str(shim), "NETWORK_LOG": str(log), "TMPDIR": str(temporary)}
    unset = "unset ORT_DISABLE_TELEMETRY HF_HUB_DISABLE_TELEMETRY DO_NOT_TRACK"
    code, _, err = export(until="report", before=unset, **watched)
    assert code == 0, err
    words = ["-m", "deploy", "generate", str(tmp_path / "out"), "--prompt", "x", "--runner"]
    for more in ("onnxruntime", "torch"):
        done = subprocess.run(
            ["bash", "-c", f"{unset}; {shlex.join([sys.executable, *words, more])}"],
            cwd=REPOSITORY,
            env={**os.environ, **watched},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()
    assert not [path for path in temporary.rglob("*") if not path.is_dir()]
    subprocess.run([sys.executable, "-c", LOOKS_UP], env={**os.environ, **watched}, check=True)
    assert log.read_text() == "socket \ngetaddrinfo name.invalid\n"  # it would have been seen


def test_nor_does_the_library_without_a_command_line(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    script = (
        "import sys; from pathlib import Path; from exporter.run.onnxruntime import OnnxSession\n"
        "OnnxSession(Path(sys.argv[1]), 16).close()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", script, str(tiny_export() / "onnx")]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
