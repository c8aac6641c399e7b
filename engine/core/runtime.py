"""Where a process computes, in which arithmetic, what of it is pinned, and who does jobs that need no other.

It knows devices and dtypes, not what is computed.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from engine.core.config import ModelConfigSection
from engine.core.errors import EngineError

J = TypeVar("J")
A = TypeVar("A")
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
    """Fix what else decides the last bits of this process: CPU threads and cuDNN's and cuBLAS's choice of kernels.

    Call it before the first use of a GPU: cuBLAS reads its workspace's size when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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


def choose_device(wanted: str, key: str = "model.device") -> str:
    """Return the device of this process; auto takes a GPU where there is one.

    Raises: EngineError, which names the `key`, when a GPU is asked for and there is none.
    """
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(
            f"{key}={wanted} needs a GPU that torch can use; it sees none on this machine. Install a CUDA build of "
            f"torch and a driver, run on the cluster (ray.address), or use {key}=cpu."
        )
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def encoder_device(section: ModelConfigSection) -> str:
    """Return where the SSL encoder runs: here, on a GPU if there is one, wherever the replicas are."""
    return "cuda" if section.device != "cpu" and torch.cuda.is_available() else "cpu"


AUTO = "auto"


def this_process(device: str) -> Ask:
    """Return what tells of this process; `device` is model.device."""
    return lambda: hardware_of(choose_device(device))


def settle_dtype(asked: str, begun: Callable[[], str | None], ask: Ask) -> str:
    """Return the dtype to compute in: the one asked for; for auto that of the run as it began, else what fits."""
    if asked != AUTO:
        return asked
    return begun() or choose_dtype(ask()).dtype


def explain_dtype(asked: str, used: str, hardware: Hardware) -> str:
    """Say why a dtype is used, in a few words."""
    if asked != AUTO:
        return "as configured"
    choice = choose_dtype(hardware)
    if choice.dtype != used:
        return f"auto: as the run began; here it would be {choice.dtype}, for {choice.reason}"
    return f"auto: {choice.reason}"


def remark_on_dtype(asked: str, used: str, hardware: Hardware, key: str = "model.dtype") -> str | None:
    """Return the line a user should read about a dtype, if there is any; `key` names it in the configuration."""
    choice = choose_dtype(hardware)
    if asked == AUTO and choice.dtype != used:
        return f"{key}=auto keeps {used}, with which this run began; here it would be {choice.dtype}: {choice.reason}."
    if used == "bfloat16" and hardware.device == "cpu" and hardware.bfloat16 is None:
        return f"{key}=bfloat16 is several times slower here than float32: {choice.reason}. Use auto for new runs."
    return None


def facts_of(asked: str, used: str, hardware: Hardware) -> dict[str, str]:
    """Return what reports say of device and dtype."""
    return {"device": hardware.device, "dtype": used, "dtype_reason": explain_dtype(asked, used, hardware)}


def announce_address(address: str | None) -> None:
    """Set RAY_ADDRESS for `ray.address` (host:port, "auto" or "local"; None: a private Ray).

    The package actors looks there when it chooses how to authenticate, so call this before importing it.
    """
    if address == "auto":
        os.environ.setdefault("RAY_ADDRESS", "auto")
    elif address is not None:
        os.environ["RAY_ADDRESS"] = address


class MapJobs(Protocol):
    """Does jobs in any order; yields what `work` returned, as it comes."""

    def __call__(self, work: Callable[[J], A], jobs: Sequence[J]) -> Iterator[A]: ...


def one_by_one(work: Callable[[J], A], jobs: Sequence[J]) -> Iterator[A]:
    """Do the jobs in this process: the specification of MapJobs."""
    for job in jobs:
        yield work(job)
