"""Where a process computes, and what of its arithmetic is pinned."""

import torch

from engine.config import RunConfig
from engine.errors import EngineError


def pin_arithmetic(threads: int) -> None:
    """Fix what else decides the last bits of this process: CPU threads and cuDNN's and cuBLAS's choice of kernels."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


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
