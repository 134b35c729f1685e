"""How near a quantized model is to its float model on a text: perplexity of both, top-1 agreement,
KL divergence, and what both write after the same words. It says nothing of the export, which the other levels prove.

All arithmetic is the reference's, log-probabilities and sums are fp64. One model is in memory at a
time, besides the float model's head; logits only of CHUNK positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from plugins.errors import CheckError

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from calibration.checkpoints.checkpoint import Checkpoint
    from calibration.progress import Progress
    from calibration.quant.folder import QuantModel
    from calibration.reference.model import FloatReference, Reference

__all__ = ["Quality", "QualityReport", "FloatStates", "measure_quality", "quality_steps"]

# positions whose fp64 log-probabilities are held at once: 50 MB each for a vocabulary of 49152
CHUNK = 128
_PROMPT, _SAMPLE = 16, 24  # tokens of the sample's beginning, and of its continuation


@dataclass
class Quality:
    """Sums over predicted tokens, of one model against its float model.

    Attributes:
        tokens: how many predictions were compared.
        nll: sum of -log p(token), in nats.
        same: predictions whose most likely token is the float model's.
        divergence: sum of KL(float || model) of the next-token distributions, in nats.
    """

    tokens: int = 0
    nll: float = 0.0
    same: int = 0
    divergence: float = 0.0

    def add(self, reference: Tensor, log_probabilities: Tensor, targets: Tensor) -> None:
        """Count more predictions: log-probabilities [S, V] of the float model and of this one, and
        the true tokens [S]. A divergence is summed over V in their type.
        """
        self.tokens += len(targets)
        likelihoods = log_probabilities.gather(-1, targets[:, None])
        self.nll -= float(likelihoods.double().sum())
        self.same += int((log_probabilities.argmax(-1) == reference.argmax(-1)).sum())
        rows = (reference.exp() * (reference - log_probabilities)).sum(-1)
        self.divergence += float(rows.double().sum())

    def means(self, name: str) -> dict[str, float]:
        """{"ppl", "top1", "kl"}: perplexity, share of predictions that agree, mean divergence in
        nats.

        Raises:
            CheckError: the model computes NaN, or probabilities of zero.
        """
        nll, divergence = self.nll / self.tokens, self.divergence / self.tokens
        if not math.isfinite(nll) or not math.isfinite(divergence):
            raise CheckError(
                name,
                f"got a mean negative log-likelihood of {nll} and a divergence of {divergence}, "
                f"expected numbers",
                "The model is broken: quantise it again, and look at its report",
            )
        return {
            "ppl": math.exp(nll) if nll < 709 else math.inf,
            "top1": self.same / self.tokens,
            "kl": divergence,
        }


class FloatStates:
    """What the float model's head reads at every token of some windows, and the head: all that is
    needed to compare other models with it one after the other.

    Args:
        reference: the float model; its decoder layers are let go of.
        windows: tokens int64 [n, L], of which 1..L-1 are predicted.
        progress: advanced once a window.
    """

    def __init__(self, reference: FloatReference, windows: ndarray, progress: Progress) -> None:
        import torch

        self._windows = torch.from_numpy(windows)
        self._hidden = list(_hidden(reference, self._windows, progress))
        reference.model.model = None  # the head stays
        self._reference = reference

    def compare(self, model: Reference | None, progress: Progress) -> Quality:
        """A model against this one; None: this one with itself."""
        import torch

        total = Quality()
        states = self._hidden if model is None else _hidden(model, self._windows, progress)
        with torch.no_grad():  # inference tensors have no version, which ActivationQuantizer wants
            for window, mine, theirs in zip(self._windows, self._hidden, states, strict=True):
                targets = window[1:]
                for start in range(0, len(targets), CHUNK):
                    piece = slice(start, start + CHUNK)
                    reference = self._reference.head(mine[piece]).double().log_softmax(-1)
                    found = (
                        reference
                        if model is None
                        else model.head(theirs[piece]).double().log_softmax(-1)
                    )
                    total.add(reference, found, targets[piece])
        return total


def _hidden(model: Reference, windows: Tensor, progress: Progress) -> Iterator[Tensor]:
    import torch

    for window in windows:
        with torch.no_grad():
            yield model.hidden(window[None, :-1])[0]
        progress.advance(note="quality")


@dataclass(frozen=True)
class QualityReport:
    """What was measured.

    Attributes:
        text: its name.
        windows, seqlen, tokens: how many windows of how many tokens, and the predictions in them.
        float_ppl, ppl: perplexity of the float model and of the quantized one.
        top1: share of predictions with the same most likely token.
        kl: mean KL(float || quantized) of the next token, in nats.
        chance: perplexity of guessing, the size of the vocabulary.
        prompt, float_sample, sample: how the text begins, and how both go on, greedily.
    """

    text: str
    windows: int
    seqlen: int
    tokens: int
    float_ppl: float
    ppl: float
    top1: float
    kl: float
    chance: int
    prompt: str
    float_sample: str
    sample: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def quality_steps(windows: ndarray) -> int:
    """How far measure_quality moves the progress."""
    return 2 * (len(windows) + 1)


def measure_quality(
    checkpoint: Checkpoint,
    quant: QuantModel,
    windows: ndarray,
    text: str,
    progress: Progress,
    max_context: int | None = None,
) -> QualityReport:
    """Compare the fake-quantized reference with the float model.

    Args:
        max_context: most tokens of a sequence in the export; None: as many as the model was made for.
        windows: tokens int64 [n, L]; the first begins the sample.
        text: the name of what they are of.

    Raises:
        CheckError: the quantized model computes NaN.
    """
    from calibration.reference.model import FloatReference, float_model, quantised_model

    tokenizer, prompt = quant.tokenizer(), windows[0, :_PROMPT]
    context = int(quant.config["max_position_embeddings"])
    longest = min(max_context or context, context)  # of both samples
    reference = FloatReference(float_model(checkpoint, max_context))
    float_sample = _continued(reference, prompt, longest, progress)
    states = FloatStates(reference, windows, progress)
    baseline = states.compare(None, progress).means("the float model")
    model = quantised_model(quant, max_context=max_context)
    sample = _continued(model, prompt, longest, progress)
    total = states.compare(model, progress)
    found = total.means("the quantized model")

    def words(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return QualityReport(
        text=text,
        windows=len(windows),
        seqlen=windows.shape[1],
        tokens=total.tokens,
        float_ppl=baseline["ppl"],
        ppl=found["ppl"],
        top1=found["top1"],
        kl=found["kl"],
        chance=quant.decoder.vocab,
        prompt=words(prompt.tolist()),
        float_sample=words(float_sample),
        sample=words(sample),
    )


def _continued(model: Reference, prompt: ndarray, longest: int, progress: Progress) -> list[int]:
    """The most likely tokens behind a prompt, as far as a sequence of `longest` tokens goes."""
    import numpy as np

    from exporter.run.reference import TorchSession

    session = TorchSession(model, max_context=longest)
    logits = session.run(prompt[None], reset=True, last_only=True)
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < _SAMPLE and len(prompt) + len(tokens) < session.max_context:
        logits = session.run(np.array([[tokens[-1]]], np.int64), last_only=True)
        tokens.append(int(logits[0, -1].argmax()))
    progress.advance(note="sample")
    return tokens
