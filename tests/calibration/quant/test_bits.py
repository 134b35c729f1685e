"""Bits files: which linears a pattern names, what its bits mean over a base, and every mistake in
one line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.quant.bits import Rule, SchemeMap, as_map, read_bits_file
from calibration.quant.scheme import QuantScheme
from plugins.errors import InputError
from tests.calibration.llama import llama

QQQ = QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True)
QQQ64 = QuantScheme("QQQGemm", "rtn", 4, 8, group_size=64, act_symmetric=True, dtype="bfloat16")
ABQ = QuantScheme("ABQGemm", "rtn", 4, 8)
A16 = QuantScheme("ABQGemm", "rtn", 4, 16)


def mapped(*rules: str, base: QuantScheme = QQQ) -> SchemeMap:
    """A map of rules "PATTERN BITS"."""
    return SchemeMap(base, tuple(Rule(*rule.split()) for rule in rules))


def named(pattern: str, layers: int = 12) -> list[str]:
    """Short names of the nodes that a pattern changes."""
    found = mapped(f"{pattern} w8a8").exceptions(llama(layers))
    return [node.removeprefix("model.layers.") for node in found]


@pytest.mark.parametrize(
    ("pattern", "nodes"),
    [
        ("model.layers.3.mlp.down_proj", ["3.mlp.down_proj"]),
        (
            "layers.1.*",
            ["1.self_attn.qkv_proj", "1.self_attn.o_proj", "1.mlp.gate_up_proj", "1.mlp.down_proj"],
        ),
        (
            "layers.1?.mlp.*",
            [f"{i}.mlp.{name}" for i in (10, 11) for name in ("gate_up_proj", "down_proj")],
        ),
        ("layers.[02].self_attn.qkv_proj", ["0.self_attn.qkv_proj", "2.self_attn.qkv_proj"]),
        ("down_proj", [f"{i}.mlp.down_proj" for i in range(12)]),
        ("self_attn.o_proj", [f"{i}.self_attn.o_proj" for i in range(12)]),
        ("gate_up_proj", [f"{i}.mlp.gate_up_proj" for i in range(12)]),
        ("[qkv]_proj", [f"{i}.self_attn.qkv_proj" for i in range(12)]),
        ("*", [node.removeprefix("model.layers.") for node in list(llama(12).nodes)]),
    ],
)
def test_patterns_match_whole_names_or_their_ends(pattern: str, nodes: list[str]) -> None:
    assert named(pattern) == nodes


def test_the_last_match_counts_and_members_have_their_nodes_scheme() -> None:
    found = mapped("* w8a8", "layers.1.* w6a6", "*.1.mlp.down_proj w2ba8-g64")
    labels = {node: scheme.label for node, scheme in found.nodes(llama(2)).items()}
    assert labels == {
        node: "w8a8" if ".0." in node else "w2ba8-g64" if node.endswith("down_proj") else "w6a6"
        for node in list(llama(2).nodes)
    }
    assert list(labels) == list(llama(2).nodes)
    for name in ("qkv_proj", "q_proj", "k_proj", "v_proj"):
        assert found.of(f"model.layers.1.self_attn.{name}", llama(2)).label == "w6a6"
    assert [scheme.label for scheme in found.schemes()] == ["w4a8", "w8a8", "w6a6", "w2ba8-g64"]


@pytest.mark.parametrize(
    ("base", "bits", "expected"),
    [
        (QQQ, "w8a8", QuantScheme("ABQGemm", "rtn", 8, 8, act_symmetric=True)),
        (QQQ, "W4A8", QQQ),
        (QQQ, "w4a8-g128", QuantScheme("QQQGemm", "rtn", 4, 8, group_size=128, act_symmetric=True)),
        (QQQ, "w4a8-g32", QuantScheme("ABQGemm", "rtn", 4, 8, group_size=32, act_symmetric=True)),
        (QQQ, "w4a16", QuantScheme("ABQGemm", "rtn", 4, 16)),
        (QQQ64, "w4a8", QQQ64),
        (QQQ64, "w2Ba8", QuantScheme("ABQGemm", "rtn", 2, 8, True, 64, True, "bfloat16")),
        (QQQ64, "w1*a4-G16", QuantScheme("ABQGemm", "rtn", 1, 4, True, 16, True, "bfloat16")),
        (
            QQQ64,
            "w4a8-g0",
            QuantScheme("QQQGemm", "rtn", 4, 8, act_symmetric=True, dtype="bfloat16"),
        ),
        (ABQ, "w4a8-g64", QuantScheme("ABQGemm", "rtn", 4, 8, group_size=64)),
        (ABQ, "w3a6", QuantScheme("ABQGemm", "rtn", 3, 6)),
        (A16, "w4a8", QuantScheme("ABQGemm", "rtn", 4, 8)),
    ],
)
def test_bits_over_a_base(base: QuantScheme, bits: str, expected: QuantScheme) -> None:
    assert Rule("*", bits).scheme(base) == expected


def test_a_single_scheme_is_a_map() -> None:
    assert as_map(QQQ) == SchemeMap(QQQ) and as_map(SchemeMap(ABQ)) == SchemeMap(ABQ)
    assert SchemeMap(QQQ).nodes(llama(3)) == dict.fromkeys(list(llama(3).nodes), QQQ)
    assert (
        SchemeMap(QQQ).exceptions(llama(3)) == {} == mapped("down_proj w4a8").exceptions(llama(3))
    )


def test_linears_and_weights_by_scheme() -> None:
    found = mapped("layers.0.self_attn.* w8a8")
    eight = found.of("model.layers.0.self_attn.o_proj", llama(2))
    assert found.linears(llama(2))[eight] == {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.self_attn.k_proj": (32, 64),
        "model.layers.0.self_attn.v_proj": (32, 64),
        "model.layers.0.self_attn.o_proj": (64, 64),
    }
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128
    assert found.weights(llama(2)) == {eight: attention, QQQ: attention + 2 * mlp}


def test_plain_json_and_text_round_trip(tmp_path: Path) -> None:
    found = mapped(
        "down_proj w8a8", "layers.1.* w2ba8-g16", "model.layers.1.self_attn.o_proj w4a16"
    )
    assert SchemeMap.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert SchemeMap(QQQ).as_dict() == QQQ.as_dict() and SchemeMap.from_dict(
        QQQ.as_dict()
    ) == SchemeMap(QQQ)
    assert found.as_text() == (
        "# Over a base of w4a8; the last line that matches counts.\n"
        "down_proj                       w8a8\n"
        "layers.1.*                      w2ba8-g16\n"
        "model.layers.1.self_attn.o_proj w4a16\n"
    )
    path = tmp_path / "bits.txt"
    path.write_text(found.as_text())
    assert read_bits_file(path, QQQ) == found


def test_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "bits.txt"
    path.write_text("# all\n\n  down_proj\tW8A8  # the wide one\r\n")
    assert read_bits_file(path, QQQ) == mapped("down_proj W8A8")
    assert read_bits_file(path, QQQ).rules[0].where == f"{path}, line 3"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "down_proj w8a8\n\ndown_proj",
            "{path}, line 3: got 'down_proj', expected a pattern and bits. Write a line such "
            "as: down_proj w8a8.",
        ),
        (
            "down_proj w8 a8",
            "{path}, line 1: got 'down_proj w8 a8', expected a pattern and bits. Write a line "
            "such as: down_proj w8a8.",
        ),
        (
            "down_proj 8",
            "{path}, line 1: got bits '8', expected w<W>a<A> or w<W>a<A>-g<G>, such as w4a8, "
            "w2ba8-g64 or w8a16. "
            "Write weight bits, activation bits (16 for weight-only) and, if you like, the group size.",
        ),
        (
            "a w9a8",
            "{path}, line 1: got '9', expected 1 to 8, 1* (3 levels) or 2* (5 levels). "
            "Give one of these; in a shell write 2b or '2*' for the balanced set.",
        ),
        (
            "# one\na w4a9",
            "{path}, line 2: got 9, expected 2 to 8, or 16 for weight-only. Give one of these.",
        ),
        (
            "# nothing\n",
            "{path}: got no rule, expected at least one line such as: down_proj w8a8. "
            "Leave out --bits-file for the same bits everywhere.",
        ),
    ],
)
def test_lines_that_are_no_rules(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bits.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_bits_file(path, QQQ)
    assert str(caught.value) == message.format(path=path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, problem in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary", "a file that is not UTF-8"),
    ):
        with pytest.raises(InputError) as caught:
            read_bits_file(path, QQQ)
        assert (
            str(caught.value)
            == f"--bits-file: got {problem} for {path}, expected a text file. Check the path."
        )


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bits.txt"
    for pattern in ("down_prj", "layers.2.*", "lm_head", "proj", "DOWN_PROJ"):
        path.write_text(f"down_proj w8a8\n{pattern} w8a8\n")
        with pytest.raises(InputError) as caught:
            read_bits_file(path, QQQ).nodes(llama(2))
        assert str(caught.value) == (
            f"{path}, line 2: got pattern '{pattern}', which matches none of this model's "
            f"linears, expected names as in "
            "model.layers.0.self_attn.qkv_proj, model.layers.0.self_attn.o_proj, "
            "model.layers.0.mlp.gate_up_proj, "
            "model.layers.0.mlp.down_proj; layers 0 to 1. Check the spelling and the layer."
        )


def test_linears_of_one_node_need_one_scheme(tmp_path: Path) -> None:
    path = tmp_path / "bits.txt"
    path.write_text("layers.1.* w6a8\nlayers.1.mlp.up_proj w8a8\n")
    found = read_bits_file(path, QQQ)
    with pytest.raises(InputError) as caught:
        found.nodes(llama(2))
    assert str(caught.value) == (
        f"model.layers.1.mlp.gate_up_proj: got gate_proj w6a8 ({path}, line 1), up_proj w8a8 "
        f"({path}, line 2); expected one scheme, "
        "because these linears are one GEMM node. Name gate_up_proj or every linear of it."
    )
    with pytest.raises(InputError) as caught:
        mapped("q_proj w8a8").of("model.layers.7.self_attn.v_proj", llama(8))
    assert str(caught.value) == (
        "model.layers.7.self_attn.qkv_proj: got q_proj w8a8 (a rule), k_proj w4a8 (the base), "
        "v_proj w4a8 (the base); expected one scheme, "
        "because these linears are one GEMM node. Name qkv_proj or every linear of it."
    )
    assert (
        mapped("q_proj w4a8", "k_proj W4A8-g0").exceptions(llama(2)) == {}
    )  # the base's own, said again
