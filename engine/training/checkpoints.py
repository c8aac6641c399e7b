"""Files of a training run, written whole or not at all.

Invariant: a file that exists under its name is complete (it was written beside it, fsynced and renamed).
It does not know what the tensors mean. Nothing is ever unpickled: torch.load runs with weights_only=True.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.core.errors import CheckpointError
from engine.core.files import replacing


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a sibling file, then put it durably in `path`'s place.

    Raises: CanvasError if the disk refuses (full, read-only); the file that was there then still stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write(partial)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and nested dicts or lists of them. Raises: CanvasError if the disk refuses."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a path, torch.save would turn a full disk into a bare RuntimeError
            torch.save(state, file)

    write_atomically(path, write)


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
