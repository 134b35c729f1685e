"""The side of benchmarks/cpu.py that runs a peer, with the peer's own Python: llama.cpp or ORT-GenAI.

python benchmarks/cpu_peer_side.py KIND MODEL TOKENS --threads N
KIND is llama.cpp, llama.cpp-plain (weights not repacked) or genai; TOKENS a JSON file with a list of
them. Prints one line of JSON: what benchmarks/cpu.py measures of our own runners. It imports nothing
of this project.

python benchmarks/cpu_peer_side.py quantize FROM.gguf TO.gguf --type Q4_0
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREFILL, DECODE, PASTS = 512, 32, (128, 2000)
CONTEXT = 2304


def memory() -> dict[str, float]:
    """MB of this process: anonymous, and mapped from files."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    kilobytes = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", text)}
    anonymous = kilobytes["Anonymous"] / 1e3
    return {"anonymous_mb": anonymous, "mapped_mb": kilobytes["Rss"] / 1e3 - anonymous}


class Llama:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, path: str, threads: int, repack: bool) -> None:
        import llama_cpp

        defaults = llama_cpp.llama_model_default_params
        if not repack:

            def plain() -> Any:
                params = defaults()
                params.use_extra_bufts = False
                return params

            llama_cpp.llama_model_default_params = plain
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=CONTEXT,
            n_batch=PREFILL,
            n_ubatch=PREFILL,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def reset(self) -> None:
        """Forget the cache."""
        self._llama.reset()

    def feed(self, tokens: Sequence[int]) -> None:
        """Run the model on more tokens; logits of the last."""
        self._llama.eval(list(tokens))


class GenAi:
    """ONNX Runtime's generate() library."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as genai

        self._genai = genai
        config = genai.Config(path)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)
        self._generator: Any = None

    def reset(self) -> None:
        """Forget the cache."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)

    def feed(self, tokens: Sequence[int]) -> None:
        """Run the model on more tokens; logits of the last."""
        self._generator.append_tokens(list(tokens))


def measure(peer: Llama | GenAi, tokens: Sequence[int]) -> dict[str, float]:
    """Prefill and decode, as benchmarks/cpu.py measures them."""
    found = {}
    for _ in range(2):  # the first time fills caches
        peer.reset()
        began = time.perf_counter()
        peer.feed(tokens[:PREFILL])
        found["prefill_tokens_per_second"] = PREFILL / (time.perf_counter() - began)
    for past in PASTS:
        peer.reset()
        for first in range(0, past, PREFILL):
            peer.feed(tokens[first : min(first + PREFILL, past)])
        began = time.perf_counter()
        for token in tokens[past : past + DECODE]:
            peer.feed([token])
        found[f"decode_at_{past}_tokens_per_second"] = DECODE / (time.perf_counter() - began)
    return found


def quantize(source: str, target: str, kind: str) -> None:
    """A GGUF file of another type, by llama.cpp's own tool."""
    import llama_cpp

    kinds = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = kinds[kind], True, 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) != 0:
        sys.exit(f"{source}: llama.cpp refused to quantize it to {kind}")


def main() -> None:
    """Measure, or quantize."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("llama.cpp", "llama.cpp-plain", "genai", "quantize"))
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--type", default="Q4_0")
    args = parser.parse_args()
    if args.kind == "quantize":
        quantize(args.model, args.tokens, args.type)
        return
    tokens = json.loads(Path(args.tokens).read_text(encoding="utf-8"))
    began = time.perf_counter()
    peer = (
        GenAi(args.model, args.threads)
        if args.kind == "genai"
        else Llama(args.model, args.threads, args.kind == "llama.cpp")
    )
    found = {"load_seconds": time.perf_counter() - began, **memory()}
    print(json.dumps(found | measure(peer, tokens)))


if __name__ == "__main__":
    main()
