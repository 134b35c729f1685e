"""The levels of a proof in which a torch model takes part: the quantized reference beside what the other
runners gave, and the float model beside that reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.graph.names import is_routed, layer_output
from exporter.proof.basis import RotatedRunner, recorded_rotation
from exporter.proof.comparison import ONNX_RUNTIME, TENSORRT, TORCH, Comparison, Outputs, Pairs
from exporter.proof.engine_levels import FUSED, PROOF_ENGINES
from exporter.proof.judge import AS_RUN, INNER, PROOF_ENGINE
from exporter.proof.options import REFERENCE
from exporter.proof.runners import LockstepRunner, ReplayRunner, SessionRunner
from exporter.run.reference import TorchSession

if TYPE_CHECKING:
    from calibration.checkpoints.checkpoint import Checkpoint

__all__ = ["run_float", "run_reference"]

USERS, SHOWN = "native, as users run it", "native, with inner tensors"
LOCKSTEP, LOCKSTEP_USERS = "torch-lockstep", "torch-lockstep, as users run it"
LOCKSTEP_ENGINES, FLOAT = "torch-lockstep, TensorRT", "torch-float"


def run_reference(
    proof: Comparison,
    record: list[Outputs],
    users: tuple[list[Outputs], list[Outputs]],
    engine: list[Outputs],
    proven: list[Outputs],
) -> list[Outputs]:
    """ONNX Runtime against the fake-quantised torch model; what the session of users, the engine
    and the proof engines gave, where they were run, against ONNX Runtime. Returns the torch model's
    logits and layers' outputs.
    """
    scope = proof.scope
    onnx = ReplayRunner(ONNX_RUNTIME, record)
    runners: list[Any] = [onnx]
    pairs: Pairs = {}
    torch: SessionRunner | LockstepRunner | None = None
    if scope.options.wants(REFERENCE) or proven:
        from calibration.reference.model import quantised_model

        model = quantised_model(scope.quant, max_context=scope.context)
    if scope.options.wants(REFERENCE):
        torch = SessionRunner(TORCH, lambda: TorchSession(model))
        if scope.quant.decoder.routers:
            torch = LockstepRunner(TORCH, model, onnx, scope.nodes, routes=True)
        # the leader of the lockstep runs before it
        runners += [torch, LockstepRunner(LOCKSTEP, model, leader=onnx, nodes=scope.nodes)]
        pairs |= {"export": (1, 0), INNER["export"]: (2, 0)}
    plain, shown = users
    if plain:
        pairs[AS_RUN] = (0, len(runners))
        runners.append(ReplayRunner(USERS, plain))
    if shown:
        leader = ReplayRunner(SHOWN, shown)
        pairs[INNER[AS_RUN]] = (len(runners) + 1, len(runners))
        runners += [leader, LockstepRunner(LOCKSTEP_USERS, model, leader, scope.nodes)]
    if engine:
        pairs["kernel"] = (0, len(runners))
        runners.append(ReplayRunner(TENSORRT, engine))
    if proven:
        leader = ReplayRunner(PROOF_ENGINES, proven)
        lockstep = LockstepRunner(LOCKSTEP_ENGINES, model, leader, scope.nodes)
        # Engines choose their experts themselves, so rows of one are those of other tokens.
        shared = [
            {name: array for name, array in outputs.items() if not is_routed(name)}
            for outputs in proven
        ]
        pairs[PROOF_ENGINE] = (0, len(runners) + 2)
        pairs[INNER[PROOF_ENGINE]] = (len(runners) + 1, len(runners))
        if engine:
            pairs[FUSED] = (len(runners) - 1, len(runners))
        runners += [leader, lockstep, ReplayRunner(f"{PROOF_ENGINES}, as a whole", shared)]
    wanted = ("logits", *map(layer_output, scope.layers))
    kept: list[Outputs] = []

    def keep() -> None:
        if torch is not None:
            kept.append({name: torch.outputs[name] for name in wanted})

    proof.compare(runners, pairs, keep)
    return kept


def run_float(proof: Comparison, checkpoint: Checkpoint, references: list[Outputs]) -> None:
    """The fake-quantised model's outputs against the float model on the same tokens."""
    scope = proof.scope
    from calibration.reference.model import FloatReference, float_model

    runners = [
        RotatedRunner(
            FLOAT,
            lambda: TorchSession(FloatReference(float_model(checkpoint, scope.context))),
            recorded_rotation(scope.quant),
        ),
        ReplayRunner(TORCH, references),
    ]
    proof.compare(runners, {"quantisation": (0, 1)}, each=lambda: None)
