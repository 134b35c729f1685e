"""What README, docs and examples say is true: commands parse, files exist, computed sizes are
right.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/*.md", "plugins/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
OURS = ("exporter", "deploy", "calibration", "plugins")
FOLDERS = (*OURS, "tests", "docs", "examples", "benchmarks")


class Parsed(BaseException):
    """Carries parsed arguments out of a command before it does anything."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], argparse.Namespace]:
    """parse(["deploy", "eval", ...]) -> what the real parser of `python -m deploy eval ...` makes
    of it.
    """
    real = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        raise Parsed(real(self, *arguments))

    def parsed(words: list[str]) -> argparse.Namespace:
        with pytest.raises(Parsed) as caught:
            importlib.import_module(words[0] if "." in words[0] else f"{words[0]}.__main__").main(
                words[1:]
            )
        return caught.value.arguments

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return parsed


def shell_lines(page: Path) -> list[list[str]]:
    """Words of every command in the page's ```sh blocks, indented ones too."""
    blocks = re.findall(
        r"^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def commands(page: Path, *modules: str) -> list[list[str]]:
    return [
        words[2:]
        for words in shell_lines(page)
        if words[:2] == ["python", "-m"] and words[2] in modules
    ]


def test_there_is_something_to_check() -> None:
    assert len(commands(REPOSITORY / "README.md", "exporter", "deploy")) >= 6
    assert (REPOSITORY / "README.md").read_text().splitlines()[2:5][1].startswith("make demo")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_are_ones_we_have(
    page: Path, parse: Callable[[list[str]], argparse.Namespace]
) -> None:
    from calibration.checkpoints.sources import ALIASES
    from calibration.cli import default_out, scheme_from_args

    makefile = (REPOSITORY / "Makefile").read_text()
    made = set()
    for words in shell_lines(page):
        if words[0] in ("torchrun", "ncu"):  # runs one of our commands
            words = ["python", *words[words.index("-m") :]]
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in (*OURS, "benchmarks"):
            arguments = parse(words[2:])
            if words[2] == "exporter":
                assert arguments.model in ALIASES, words
                made.add(default_out(arguments, scheme_from_args(arguments)))
            elif words[2] == "deploy":
                assert arguments.out in made, f"{words}: no command above makes this OUT"
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (REPOSITORY / words[3]).exists(), words
        elif words[0] == "compute-sanitizer":
            assert "build/anybit-selftest build/libanybit_plugins.so" in " ".join(words), words
        else:
            assert words[:4] == ["python", "-m", "pip", "install"], words
            assert words[-1] in makefile, f"{words}: the Makefile pins something else"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [
        link.split("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not link.startswith(("http", "#"))
    ]
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    missing += [
        path
        for path in paths
        if not (REPOSITORY / path).exists() and not path.startswith("benchmarks/results/")
    ]
    assert not missing


@pytest.mark.parametrize(
    "words",
    [
        ["exporter"],
        ["calibration"],
        ["deploy"],
        ["deploy", "generate"],
        ["deploy", "eval"],
        ["deploy", "trtexec"],
        ["plugins"],
        ["plugins", "build"],
        ["plugins", "sim"],
        ["plugins", "sass"],
        ["plugins", "selftest"],
    ],
    ids=" ".join,
)
def test_help_answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"{words[0]}.__main__").main([*words[1:], "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {' '.join(words)} ")


def test_pictures_are_whole() -> None:
    pictures = sorted((REPOSITORY / "docs").glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


# ---------------------------------------------------------------- numbers and names

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}


def test_sizes_of_llama_7b() -> None:
    from calibration.families import family
    from calibration.quant.scheme import QuantScheme

    shapes = family("llama").decoder(LLAMA_7B).shapes()
    linears = {
        name: shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    }
    codes, rows = (
        sum(rows * columns for rows, columns in linears.values()),
        sum(rows for rows, _ in linears.values()),
    )
    rest = 2 * sum(
        shape[0] * (shape[1] if len(shape) == 2 else 1)
        for name, shape in shapes.items()
        if name not in linears
    )
    kv_cache = 2 * 2 * 4096 * 32 * 2048  # keys and values, fp16, width, layers, tokens
    text = (REPOSITORY / "README.md").read_text()
    for label, size in (
        ("in fp16, for comparison", 2 * codes + rest),
        ("one byte per code", codes + 4 * rows + rest),
        ("4 bits per weight", codes // 2 + 4 * rows + rest),
        ("KV cache", kv_cache),
    ):
        row = next(line for line in text.splitlines() if line.startswith("|") and label in line)
        assert f"{size / 1e9:.2f} GB |" in row
    for label, wbits, balanced in (
        ("W8", 8, False),
        ("W6", 6, False),
        ("W4", 4, False),
        ("W3", 3, False),
        ("W2\\* with", 2, True),
        ("W2,", 2, False),
        ("W1\\* with", 1, True),
        ("W1 |", 1, False),
    ):
        planes = QuantScheme("ABQGemm", "rtn", wbits, 8, balanced).attributes(1, 32, False).planes
        row = next(
            line for line in text.splitlines() if line.startswith("| ABQGemm") and label in line
        )
        assert f"{codes * planes / 8e9:.2f} GB |" in row, label


def test_the_bits_file_fits_llama_7b(tmp_path: Path) -> None:
    from calibration.families import family
    from calibration.quant.bits import read_bits_file
    from calibration.quant.scheme import QuantScheme

    block = re.search(
        r"^```text\n(# bits.txt.*?)^```",
        (REPOSITORY / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert block
    (tmp_path / "bits.txt").write_text(block.group(1))
    base = QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True)
    labels = {
        node.removeprefix("model.layers."): scheme.label
        for node, scheme in read_bits_file(tmp_path / "bits.txt", base)
        .nodes(family("llama").decoder(LLAMA_7B))
        .items()
    }
    assert (
        labels["5.mlp.down_proj"] == "w8a8"
        and labels["0.mlp.down_proj"] == "w8a8-g64"
        and labels["9.mlp.gate_up_proj"] == "w4a8"
    )
    assert (
        labels["10.mlp.down_proj"] == labels["19.mlp.gate_up_proj"] == "w2ba8-g128"
        and labels["31.self_attn.qkv_proj"] == "w4a16"
    )


def test_onnx_page_names_every_attribute_and_node(
    tiny_quant: Callable[..., Path], tmp_path: Path
) -> None:
    import onnx

    from calibration.quant.folder import read_quant
    from exporter.graph.decoder import IR_VERSION, OPSET, export_onnx
    from plugins.core.op_spec import GemmAttributes, is_custom

    export_onnx(read_quant(tiny_quant() / "quant"), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    text = (REPOSITORY / "docs" / "onnx.md").read_text()
    custom = [node for node in model.graph.node if is_custom(node.domain)]
    assert {attribute.name for attribute in custom[0].attribute} == {
        *(field.name for field in fields(GemmAttributes)),
        "plugin_namespace",
        "plugin_version",
    }
    for name in (
        *(attribute.name for attribute in custom[0].attribute),
        *(node.name.replace(".0.", ".{i}.") for node in custom[:4]),
    ):
        assert f"`{name}`" in text, name
    for value in (*model.graph.input, *model.graph.output):
        assert re.sub(r"\.\d+\.(key|value)", ".{i}.key", value.name) in text
    assert f"Opset {OPSET}, IR {IR_VERSION}" in text


@pytest.mark.parametrize(
    "scheme",
    [{"op": "ABQGemm"}, {"op": "QQQGemm", "group_size": 64}],
    ids=lambda scheme: scheme["op"],
)
def test_quant_page_names_every_tensor_and_key(
    tiny_quant: Callable[..., Path], scheme: dict[str, Any]
) -> None:
    from safetensors import safe_open

    folder = tiny_quant(**scheme) / "quant"
    text = (REPOSITORY / "docs" / "quant_format.md").read_text()
    meta = json.loads((folder / "quant.json").read_text())
    for key in (*meta, *meta["scheme"], *meta["source"]):
        assert f"`{key}`" in text, key
    with safe_open(next(folder.glob("*.safetensors")), "numpy") as file:
        names = list(file.keys())
    assert names
    for name in names:
        short = re.sub(r"layers\.\d+\.", "layers.{i}.", name)
        assert f"`{re.sub(r'.*_proj', 'L', short)}`" in text, name


def test_every_switch_of_the_methods_is_documented_with_its_default() -> None:
    from calibration.methods import find_method, method_names

    def shown(value: Any) -> str:
        return (
            ("off", "on")[value]
            if isinstance(value, bool)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )

    defaults = {
        name: {item.name: shown(item.default) for item in fields(find_method(name).settings)}
        for name in method_names()
    }
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| ",
        (REPOSITORY / "docs/calibration.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {name: qqq.strip("`") for name, qqq, _ in rows if qqq.strip()} == defaults["qqq"]
    assert {name: abq.strip("`") for name, _, abq in rows if abq.strip()} == defaults["abq"]
    assert not any(defaults[name] for name in method_names() if name not in ("qqq", "abq"))
