"""Files of a training run, written whole or not at all.

Invariant: a file that exists under its name is complete (it was written beside it, fsynced and renamed).
It does not know what the tensors mean. Nothing is ever unpickled: torch.load runs with weights_only=True.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a sibling file, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and nested dicts or lists of them."""
    write_atomically(path, lambda partial: torch.save(state, partial))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what save_checkpoint wrote, onto the CPU. Raises CheckpointError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} must be a checkpoint of this trainer; reading it failed ({error}). "
            "Delete it to begin that stage again."
        ) from error


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # np.save would append ".npy" to the partial's name
            np.save(file, array)

    write_atomically(path, write)


def save_json(path: Path, value: object) -> None:
    """Write readable JSON."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))
