"""Runs the C functions of the kernels through ctypes, on the CPU simulation, on a GPU or natively on
this CPU, with guarded and poisoned memory.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from plugins.core.op_spec import GemmAttributes
from plugins.tools.kernels import KERNEL_STEP, GemmShape, KernelLibrary, gemm_shape

__all__ = [
    "CPU_KINDS",
    "GUARD_BYTES",
    "INSTRUCTION_SETS",
    "KernelError",
    "KernelRunner",
    "cpu_missing",
    "cpu_tactic",
    "cuda_missing",
    "gpu_sm",
]

GUARD_BYTES = 256
SETS = {"x86_64": ("portable", "avx2", "avx512", "amx"), "aarch64": ("portable", "neon")}
INSTRUCTION_SETS = SETS.get(platform.machine(), ("portable",))
# What KernelRunner takes: AMX also with C++ in place of its instructions, where there is AVX-512.
CPU_KINDS = (*(f"cpu-{isa}" for isa in INSTRUCTION_SETS), "emulated-amx")
POISON = 0xCB
_ANY, _F32 = GemmAttributes(4, 16, 8, 1, 0, 16, 16, 0), np.dtype(np.float32)


class KernelError(RuntimeError):
    """A kernel function returned an error code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"error {code}: {message}")
        self.code = code


def cuda_missing() -> str:
    """Why CUDA kernels cannot run here; empty if they can."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver (libcuda.so.1) on this machine"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device visible to torch"


def cpu_tactic(isa: str) -> int:
    """The tactic of the native kernels of an instruction set; see plugins/core/cpu/op.h."""
    sets = next(sets for sets in SETS.values() if isa in sets)
    return KERNEL_STEP * (sets.index(isa) + 1) + 1


def cpu_missing(isa: str, emulated: bool = False) -> str:
    """Why kernels of this instruction set cannot run here, emulated or not; empty if they can."""
    from plugins.tools.build import build_emulated, build_onnxruntime

    if emulated and (reason := cpu_missing("avx512")):
        return reason
    library = KernelLibrary(build_emulated() if emulated else build_onnxruntime())
    listed = library.tactics("QQQGemm", gemm_shape(_ANY, 1, _F32))
    return "" if cpu_tactic(isa) in listed else f"no {isa} on this machine"


def gpu_sm() -> int:
    """Compute capability of the GPU, times 10."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class Memory:
    """An array between two poisoned guard zones, in host memory or on the GPU."""

    def __init__(self, content: np.ndarray, on_gpu: bool) -> None:
        self.size = content.nbytes
        store = np.full(self.size + 3 * GUARD_BYTES, POISON, np.uint8)
        start = -store.ctypes.data % GUARD_BYTES
        self.host = store[
            start : start + self.size + 2 * GUARD_BYTES
        ]  # payload starts on a GUARD_BYTES boundary
        self.payload[:] = np.frombuffer(np.ascontiguousarray(content).tobytes(), np.uint8)
        self.before = self.host.copy()
        self.device: Any = None
        if on_gpu:
            import torch

            self.device = torch.from_numpy(self.host).cuda()

    @property
    def payload(self) -> np.ndarray:
        """The bytes between the guards."""
        return self.host[GUARD_BYTES : GUARD_BYTES + self.size]

    @property
    def pointer(self) -> int:
        """Address of the payload for the kernel."""
        return (
            self.host.ctypes.data if self.device is None else self.device.data_ptr()
        ) + GUARD_BYTES

    def fetch(self) -> None:
        """Bring the bytes back from the GPU."""
        if self.device is not None:
            self.host[:] = self.device.cpu().numpy()

    def changed(self, guards_only: bool) -> bool:
        """Whether the guards, or any byte at all, differ from the start."""
        different = self.host != self.before
        if guards_only:
            different[GUARD_BYTES : GUARD_BYTES + self.size] = False
        return bool(different.any())


class KernelRunner:
    """One loaded kernel library.

    Args:
        kind: "sim", "cuda", or one of CPU_KINDS.
    """

    def __init__(self, kind: str) -> None:
        from plugins.tools.build import (
            build_emulated,
            build_library,
            build_onnxruntime,
            build_sim,
        )

        self.kind, _, self.isa = kind.partition("-")
        build = {
            "sim": build_sim,
            "cuda": build_library,
            "cpu": build_onnxruntime,
            "emulated": build_emulated,
        }[self.kind]
        self.workspace = np.empty(0, np.uint8)  # what the last gemm() left in the scratch memory
        self.kernels = KernelLibrary(build())
        self.library = self.kernels.library
        if kind == "sim":
            self.library.anybit_sim_last_error.restype = ctypes.c_char_p

    def set_order(self, seed: int) -> None:
        """Thread order of the simulation from now on; a GPU has its own."""
        if self.kind == "sim":
            self.library.anybit_sim_set_seed(ctypes.c_uint(seed))

    def set_device(self, sm: int, multiprocessors: int, shared_per_block: int = 227 << 10) -> None:
        """The GPU for which the simulation chooses kernels from now on."""
        if self.kind == "sim":
            self.library.anybit_sim_set_device(sm, multiprocessors, shared_per_block)

    def tactics(
        self, op: str, attrs: GemmAttributes, tokens: int, dtype: np.dtype[Any]
    ) -> dict[int, str]:
        """Kernel names by tactic, the default choice first; on a CPU those of the instruction set
        alone.
        """
        listed = self.kernels.tactics(op, gemm_shape(attrs, tokens, dtype))
        return {cpu_tactic(self.isa): self.isa} if self.isa else listed

    def call(self, op: str, shape: GemmShape, pointers: Mapping[str, int]) -> None:
        """Call the op's C function.

        Raises:
            KernelError: it returned an error code.
        """
        code = self.kernels.run(op, shape, pointers)
        if code:
            text = (
                self.library.anybit_sim_last_error().decode()
                if self.kind == "sim"
                else "see cudaError_t"
            )
            raise KernelError(code, text)
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def launch(self, op: str, shape: GemmShape, memory: Mapping[str, Memory]) -> None:
        """Call it on such memory."""
        self.call(op, shape, {name: part.pointer for name, part in memory.items()})

    def gemm(
        self,
        op: str,
        attrs: GemmAttributes,
        x: np.ndarray,
        tensors: Mapping[str, np.ndarray],
        *,
        scratch: int = POISON,
        tactic: int = 0,
    ) -> np.ndarray:
        """Y [M, N] from x [M, K], packed tensors and gamma; checks that nothing but y and the
        workspace was written.

        Args:
            scratch: the byte that fills the workspace before the call.
            tactic: which kernel, 0 for the library's choice.
        """
        if self.isa:
            tactic = cpu_tactic(self.isa)
        shape = gemm_shape(attrs, len(x), x.dtype, tactic)
        y = np.full(len(x) * attrs.out_features * x.itemsize, POISON, np.uint8)
        workspace = np.full(self.kernels.workspace_bytes(op, shape), scratch, np.uint8)
        arrays = {"x": x, **tensors, "y": y, "workspace": workspace}
        memory = {name: Memory(array, self.kind == "cuda") for name, array in arrays.items()}
        self.launch(op, shape, memory)
        for name, part in memory.items():
            part.fetch()
            output = name in ("y", "workspace")
            assert not part.changed(guards_only=output), (
                f"{op} wrote {'around' if output else 'into'} {name}"
            )
        self.workspace = memory["workspace"].payload.copy()
        return np.frombuffer(memory["y"].payload.tobytes(), x.dtype).reshape(
            len(x), attrs.out_features
        )
