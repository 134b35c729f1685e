"""What of an artifact a proof judges: how many tokens, which layers, and the tensors that are compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.out.layout import ONNX, QUANT
from calibration.quant.scheme import FLOAT_BITS
from exporter.graph.names import WRITE_INDICES, layer_of, layer_output, new_key
from exporter.proof.judge import Stack
from exporter.proof.memory import BEYOND, Calls, attention_windows
from exporter.proof.options import ValidateOptions, max_context
from exporter.proof.runners import gemm_nodes
from exporter.run.onnxruntime import load_model
from plugins.errors import InputError

if TYPE_CHECKING:
    from calibration.quant.folder import QuantModel
    from calibration.quant.scheme import QuantScheme

__all__ = ["Scope"]


class Scope:
    """Read from the folder; nothing is run.

    Attributes:
        out: the artifact folder.
        options: what was asked for.
        quant: the quantized model.
        context: most tokens of a sequence.
        room: the same, of the other artifact too where one is compared.
        steps, tokens: greedy decode steps, and tokens of the prefill in front of them.
        layers: the decoder layers that are judged.
        nodes: the custom nodes of the graph, and routers.
        marked: the inner tensors that every runner shows.
        typed: tensors that the graph names the type of. An output of the graph, and what only standard
            ops made so far, are left to the runner.
        unpadded: whether the padded batch runs without padding: in a static cache padding comes last, and
            an expert's rows stand in another order.

    Raises:
        InputError: a stage is missing or damaged, or there are no such layers.
    """

    def __init__(self, out: Path, options: ValidateOptions) -> None:
        from calibration.quant.folder import read_quant

        self.out, self.options = out, options
        self.quant: QuantModel = read_quant(out / QUANT)
        model = load_model(out / ONNX)
        self.context = max_context(out, self.quant)
        self.room = min(self.context, max_context(options.against or out, self.quant))
        self._calls = Calls.within(self.room, self._windows(), options.tokens, options.steps)
        self.steps, self.tokens = self._calls.steps, self._calls.prefill
        self.nodes = gemm_nodes(model, self.quant.decoder)
        self.layers = self._layers()
        wanted = {*self.layers, *([None] if self.layers.stop == self.quant.layers else [])}
        judged = [node for node in self.nodes if layer_of(node.name) in wanted]
        inner = [name for node in judged for name in (node.source, node.result)]
        keys = map(new_key, self.layers if self.quant.scheme.kv_bits < FLOAT_BITS else ())
        before = range(max(self.layers.start - 1, 0), self.layers.stop)  # what the first one reads
        self.marked = list(dict.fromkeys([*inner, *map(layer_output, before), *keys]))
        self.typed = {value.name for value in model.graph.value_info}
        static = any(value.name == WRITE_INDICES for value in model.graph.input)
        self.unpadded = static and bool(self.quant.decoder.routers)

    @property
    def given(self) -> list[str]:
        """The marked tensors that a session may be given in the place of its own."""
        return [name for name in self.marked if name in self.typed]

    @property
    def to_the_end(self) -> bool:
        """Whether the last decoder layer is judged, and with it the head."""
        return self.layers.stop == self.quant.layers

    @property
    def padded(self) -> int:
        """Tokens of a row of the padded batch."""
        return self._calls.padded

    @property
    def all_tokens(self) -> int:
        """Tokens of all calls."""
        return self._calls.tokens

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """{GEMM node: how it is quantized}."""
        return {node: self.quant.scheme_of(node) for node in self.quant.decoder.nodes}

    def stack(self) -> Stack:
        """What judges the errors."""
        return Stack.of(self.quant, self.nodes, self.layers if self.options.layers else None)

    def notes(self) -> list[str]:
        """What of the model no token of the proof reaches, and how experts are judged."""
        return [*self._unreached(), *self._experts()]

    def _windows(self) -> list[int]:
        return attention_windows(self.quant.decoder, self.context)

    def _unreached(self) -> list[str]:
        """Which windows no token of the proof leaves."""
        reached = self.tokens + self.steps
        return [
            f"The attention window of {span} tokens was not reached by the {reached} that were run, "
            f"so nothing beyond it was proven; --tokens {span + BEYOND} reaches it."
            for span in self._windows()
            if span >= reached
        ]

    def _experts(self) -> list[str]:
        """How the choice of experts is judged, and what is left out."""
        notes = list[str]()
        if self.quant.decoder.routers:
            notes.append(
                "The scores of experts are compared as every operator is, given its inputs. Accumulated "
                "errors are those of the experts that ONNX Runtime chose; against the float model, an "
                "engine and the session as users run it, which choose their own, they are shown and not "
                "judged. Of that session the loss is judged, and the operators where the torch reference "
                "takes part."
            )
        if self.unpadded:
            notes.append(
                "The padded batch was run without padding: a static cache puts it behind the tokens, "
                "so that the rows of an expert stand in another order."
            )
        return notes

    def _layers(self) -> range:
        """The decoder layers to be judged."""
        first, end = self.options.layers or (0, self.quant.layers)
        if not 0 <= first < end <= self.quant.layers:
            raise InputError(
                "--layers",
                f"got {first}:{end}, expected A:B with 0 <= A < B <= {self.quant.layers}, the "
                "number of decoder layers",
                "Give such numbers; B itself is left out",
            )
        return range(first, end)
