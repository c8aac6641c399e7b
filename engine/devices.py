"""Where a process computes, in which arithmetic, and what of it is pinned."""

import ctypes
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.config import RunConfig
from engine.errors import EngineError

CPU_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "sve_bf16": "SVE", "bf16": "Arm bf16"}
"""Flags of torch.cpu.get_capabilities (torch 2.13; the last two on Arm) of CPUs that multiply bfloat16."""
CUDA_BFLOAT16 = (8, 0)
"""The first compute capability that multiplies bfloat16."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_LARGEST_MMAP_THRESHOLDS = (1 << 30, 32 << 20)
"""In bytes; glibc before 2.35 refuses more than the second."""


@dataclass(frozen=True)
class Hardware:
    """What a process computes on."""

    device: str
    """"cpu" or "cuda"."""
    name: str
    """Of the CPU or GPU."""
    bfloat16: str | None
    """What multiplies bfloat16; None: nothing does."""


UNSEEN_GPU = Hardware("cuda", "a GPU of compute capability 8.0 or more", "assumed")
"""What a plan reckons with where a GPU is asked for that this machine has not."""


@dataclass(frozen=True)
class DtypeChoice:
    """An arithmetic, and why it is the one."""

    dtype: str
    reason: str


Ask = Callable[[], Hardware]
"""Finds out what replicas compute on. Raises: EngineError if they cannot be had."""


def hardware_of(device: str) -> Hardware:
    """Return what this process computes on; `device` is "cpu" or "cuda"."""
    if device == "cuda":
        return cuda_hardware(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    return cpu_hardware(torch.cpu.get_capabilities())


def cpu_hardware(capabilities: Mapping[str, object]) -> Hardware:
    """Return the CPU of these capabilities, named and flagged as torch does."""
    found = next((name for flag, name in CPU_BFLOAT16.items() if capabilities.get(flag)), None)
    return Hardware("cpu", str(capabilities.get("cpu_name") or platform.machine()), found)


def cuda_hardware(name: str, capability: tuple[int, int]) -> Hardware:
    """Return the GPU of this name and compute capability (major, minor)."""
    number = ".".join(map(str, capability))
    found = f"compute capability {number}" if capability >= CUDA_BFLOAT16 else None
    return Hardware("cuda", f"{name} ({number})", found)


def choose_dtype(hardware: Hardware) -> DtypeChoice:
    """Choose bfloat16 where it is multiplied, else float32, on older GPUs float16.

    Where it is not, a CPU converts: one U-Net call of the demo took six times as long as in float32.
    """
    if hardware.bfloat16 is not None:
        return DtypeChoice("bfloat16", f"{hardware.name} multiplies bfloat16 ({hardware.bfloat16})")
    return DtypeChoice("float16" if hardware.device == "cuda" else "float32", f"{hardware.name} multiplies no bfloat16")


def torch_dtype(name: str) -> torch.dtype:
    """Return a dtype by its name. Raises ValueError for "auto", which must be settled before a model is loaded."""
    if name == "auto":
        raise ValueError("model.dtype=auto must be settled by engine.dtypes before a weight is read; it is not.")
    return getattr(torch, name)


def pin_arithmetic(threads: int) -> None:
    """Fix what else decides the last bits of this process: CPU threads and cuDNN's and cuBLAS's choice of kernels."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory(device: str) -> bool:
    """Let a process whose work is networks on the CPU keep what it frees; say whether the allocator is glibc's.

    glibc maps every large activation anew, and the kernel zeroes its pages again at each call: a fifth of the time of
    the demo's U-Net. What is kept is the largest call's activations, so the peak stays as it is. The bytes of results
    do not depend on it; another allocator or system is left alone.
    """
    if device != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never back to the system
    return any(libc.mallopt(_M_MMAP_THRESHOLD, nbytes) for nbytes in _LARGEST_MMAP_THRESHOLDS)


def choose_device(wanted: str) -> str:
    """Return "cpu" or "cuda" for this process. Raises EngineError when a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "model.device=cuda needs a GPU that torch can use; it sees none on this machine. Install a CUDA build of "
            "torch and a driver, run on the cluster (ray.address), or use model.device=cpu."
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def encoder_device(config: RunConfig) -> str:
    """Return where the SSL encoder runs: here, on a GPU if there is one, wherever the replicas are."""
    return "cuda" if config.model.device != "cpu" and torch.cuda.is_available() else "cpu"
