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

from deploy import commands as commands_of_deploy
from tests.tracked import REPOSITORY, may_be_tracked, tracked_files

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/*.md", "plugins/**/*.md")
    for path in REPOSITORY.glob(pattern)
    if may_be_tracked(path)
)
README, DOCS = REPOSITORY / "README.md", REPOSITORY / "docs"
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
    assert len(commands(DOCS / "getting_started.md", "exporter", "deploy")) >= 6
    assert [words[:2] for words in shell_lines(README)] == [["make", "demo"], ["make", "test"]]
    assert README.read_text().splitlines()[2:5][1].startswith("make demo")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_are_ones_we_have(
    page: Path, parse: Callable[[list[str]], argparse.Namespace]
) -> None:
    from calibration.cli import default_out, scheme_from_args
    from calibration.families import aliases

    makefile = (REPOSITORY / "Makefile").read_text()
    made = set()
    for words in shell_lines(page):
        if words[0] in ("torchrun", "ncu"):  # runs one of our commands
            words = ["python", *words[words.index("-m") :]]
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in (*OURS, "benchmarks"):
            arguments = parse(words[2:])
            if words[2] == "exporter":
                assert arguments.model in aliases(), words
                made.add(default_out(arguments, scheme_from_args(arguments)))
            elif words[2] == "deploy":
                wanted = commands_of_deploy()[arguments.command].out_help  # else it takes no OUT
                assert not wanted or arguments.out in made, f"{words}: no command makes this OUT"
                made |= {getattr(arguments, name, None) for name in ("to", "output")}
        elif Path(words[0]).parent in made:
            assert Path(words[0]).name == "serve.sh", words  # of deploy triton
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (REPOSITORY / words[3]).exists(), words
        elif words[0] == "compute-sanitizer":
            assert "build/anybit-selftest build/libanybit_plugins.so" in " ".join(words), words
        else:
            assert words[:4] == ["python", "-m", "pip", "install"], words
            assert words[-1] in makefile, f"{words}: the Makefile pins something else"


def links(page: Path) -> list[str]:
    """Targets of the page's links that stay in the repository, outside its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not link.startswith("http")]


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


def resolves(page: Path, link: str) -> bool:
    """Whether a link leads to a file in the repository and, if it says so, to a heading of it."""
    name, _, fragment = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists() or not target.is_relative_to(REPOSITORY):
        return False
    return not fragment or fragment in anchors(target)


def test_broken_links_are_seen(tmp_path: Path) -> None:
    page = DOCS / "README.md"
    assert resolves(page, "limits.md#measured") and resolves(page, "../README.md")
    for broken in ("limits.md#measures", "no.md", "#nothing", "../../elsewhere.md"):
        assert not resolves(page, broken), broken


def test_the_index_lists_every_page() -> None:
    listed = {(DOCS / link).resolve() for link in links(DOCS / "README.md")}
    pages = {page for page in PAGES if page.parent == DOCS and page.name != "README.md"}
    assert pages and not pages - listed


def test_common_changes_and_the_files_they_are_made_in() -> None:
    """The last section of docs/architecture.md; that its links resolve is tested with all others."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    *_, title, section = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    assert title == "Where do I change ..."
    assert len(rows) >= 10
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    for number, what, where in rows:
        files = re.findall(r"\]\(([^)\s]+)\)", where)
        assert files and all((DOCS / file).is_file() for file in files), (number, what)


def test_what_no_gpu_has_run_is_said_once() -> None:
    """In README's support table, which the other pages link to."""
    pattern = re.compile(
        r"(never|not|nothing|none|no\s+gpu)\b[^.|]{0,60}\brun\b[^.|]{0,20}\bgpu|no\s+gpu\s+has",
        re.I,
    )
    pages = [page for page in PAGES if page.name not in ("TODO-gpu.md", "CHANGELOG.md")]
    said = [
        (page.name, match.group()) for page in pages for match in pattern.finditer(page.read_text())
    ]
    assert said == [("README.md", "never run on a GPU")]


def test_nothing_is_said_of_how_busy_a_machine_was() -> None:
    pattern = re.compile(
        r"\bbusy\b|\bother (jobs|work|programs)\b|shared machine|jobs shared", re.I
    )
    assert not [page.name for page in PAGES if pattern.search(page.read_text())]


def test_output_in_readme_is_of_the_commands_that_make_runs() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    names = dict(re.findall(r"^(\w+)\s*\??:?=\s*(.+)$", makefile, re.MULTILINE))
    while "$(" in makefile.split("\ntest:")[0].split("\ndemo:")[1]:
        makefile = re.sub(r"\$\((\w+)\)", lambda name: names.get(name.group(1), ""), makefile)
    block = re.findall(r"^```text\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)[0]
    shown = [line for line in block.splitlines() if line.startswith(".venv/")]
    assert [line.split()[2] for line in shown] == ["exporter", "deploy"]
    recipes = [line.strip().lstrip("@") for line in makefile.splitlines()]
    assert not [line for line in shown if line not in recipes]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in links(page) if not resolves(page, link)]
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
        *([name] for name in OURS),
        *(["deploy", name] for name in commands_of_deploy()),
        *(["plugins", name] for name in ("build", "sim", "sass", "selftest")),
    ],
    ids=" ".join,
)
def test_help_answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"{words[0]}.__main__").main([*words[1:], "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {' '.join(words)} ")


def test_pictures_are_whole() -> None:
    pictures = [path for path in tracked_files() if path.parent == DOCS and path.suffix == ".svg"]
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
    text = (DOCS / "getting_started.md").read_text()
    for label, size in (
        ("in fp16, for comparison", 2 * codes + rest),
        ("one byte per code", codes + 4 * rows + rest),
        ("4 bits per weight", codes // 2 + 4 * rows + rest),
        ("KV cache", kv_cache),
    ):
        row = next(line for line in text.splitlines() if line.startswith("|") and label in line)
        assert f"{size / 1e9:.2f} GB |" in row
    text = (DOCS / "bits.md").read_text()
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


def test_perplexities_are_those_of_the_result_files() -> None:
    def result(name: str) -> Any:
        return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())

    settings = result("calibration-settings-2026-11-25")["rows"]
    peer = result("calibration-peer-2026-11-25")["settings"]
    channel, groups = peer["per channel"]["rows"], peer["g64"]["rows"]
    expected = {
        "float": (channel["float"],),
        "W4A8": (channel["anybit-trt"], channel["llm-compressor"]),
        "W4A8, groups of 64": (groups["anybit-trt"], groups["llm-compressor"]),
        "W8A8": (settings["w8a8"],),
        "W6A6": (settings["w6a6"],),
        "W3A8, groups of 64": (settings["w3a8-g64"],),
        "W2\\*A8, groups of 64": (settings["w2ba8-g64"],),
        "W4A4, groups of 64": (settings["w4a4-g64"],),
    }
    for page, title, rows in (
        (README, "## Results", 7),
        (DOCS / "limits.md", "### Quality", 8),
    ):
        section = page.read_text().split(title)[1].split("\n\n|")[1].split("\n\n")[0]
        found = [line.split(" | ") for line in section.splitlines()[2:]]
        assert len(found) == rows
        for name, *cells in found:
            label = name.removeprefix("| ").removesuffix(" (5 levels)")
            numbers = [cell for cell in cells if re.fullmatch(r"\d+\.\d\d", cell.strip(" |"))]
            shown = [number.strip(" |") for number in numbers]
            assert shown == [f"{row['ppl']:.2f}" for row in expected[label]], label


def test_the_bits_file_fits_llama_7b(tmp_path: Path) -> None:
    from calibration.families import family
    from calibration.quant.bits import read_bits_file
    from calibration.quant.scheme import QuantScheme

    block = re.search(
        r"^```text\n(# bits.txt.*?)^```",
        (DOCS / "bits.md").read_text(),
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

    export_onnx(read_quant(tiny_quant(has_minimum=True) / "quant"), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    text = (DOCS / "onnx.md").read_text()
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
    text = (DOCS / "quant_format.md").read_text()
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
        (DOCS / "calibration.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {name: qqq.strip("`") for name, qqq, _ in rows if qqq.strip()} == defaults["qqq"]
    assert {name: abq.strip("`") for name, _, abq in rows if abq.strip()} == defaults["abq"]
    assert not any(defaults[name] for name in method_names() if name not in ("qqq", "abq"))


def test_code_in_extending_is_what_other_tests_run() -> None:
    """A family, a runner and a command; docs/methods.md has its own test, and so has the op."""
    from tests.deploy.test_toy import COMMAND, RUNNER

    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    family, *others = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    name, _, source = family.partition("\n")
    assert (REPOSITORY / name.removeprefix("# ")).read_text(encoding="utf-8") == source
    assert [block.strip() for block in others] == [RUNNER.strip(), COMMAND.strip()]
