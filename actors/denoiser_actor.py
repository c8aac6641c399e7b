"""DenoiserActor, one model replica behind stateless calls, and the form in which weights travel to it.

Invariant: the actor adds nothing to LocalDenoiser but a place to run, so its answers have the same bytes. It does not
import Ray: pool.py makes an actor of the class.
"""

import copy
import os
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.core.runtime import Hardware, hardware_of, keep_freed_memory, pin_arithmetic
from engine.model.config import ModelConfig
from engine.model.networks import build_networks
from engine.model.zoomldm import ZoomLDM
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    EncodeBatch,
    EncodedBatch,
    LocalDenoiser,
    TileBatch,
    TilePrediction,
)


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as numpy bytes with its strides: memory format changes the last bits, and numpy knows no bfloat16."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    data: np.ndarray
    """uint8, the elements in the order of memory."""
    crc: int


@dataclass(frozen=True)
class PackedModel:
    """A model as its config and its tensors; Ray ships the arrays without copying them."""

    config: ModelConfig
    tensors: dict[str, PackedTensor]

    @property
    def nbytes(self) -> int:
        return sum(t.data.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class ReplicaInfo:
    """Where a replica runs."""

    pid: int
    host: str
    hardware: Hardware


@dataclass(frozen=True)
class Answer:
    """A replica's answer and the seconds it computed."""

    value: TilePrediction | DecodedBatch | EncodedBatch
    seconds: float


def pack_model(model: ZoomLDM) -> PackedModel:
    """Return the model's networks in the form that travels; CPU weights are not copied. `model.extras` stay behind."""
    packed = {}
    for name, tensor in model.state_dict().items():
        dense = tensor.detach().cpu()
        if not _is_dense(dense):
            dense = dense.contiguous()
        flat = torch.as_strided(dense, (dense.numel(),), (1,))
        data = flat.view(torch.uint8).numpy()
        packed[name] = PackedTensor(tensor.dtype, tuple(dense.shape), dense.stride(), data, zlib.crc32(data.data))
    return PackedModel(model.config, packed)


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill one stretch of memory, in whatever order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def unpack_model(packed: PackedModel, device: str) -> ZoomLDM:
    """Return the model with its own copy of the weights, on `device`, in their dtypes and memory formats.

    Copied, because Ray's arrays are read-only and would hold the object store for as long as the replica lives.
    Raises: ValueError naming a tensor that was damaged on the way.
    """
    state = {}
    for name, tensor in packed.tensors.items():
        if zlib.crc32(tensor.data.data) != tensor.crc:
            raise ValueError(f"weights {name} arrived damaged (checksum differs); start the run again.")
        flat = torch.from_numpy(tensor.data.copy()).view(tensor.dtype)
        state[name] = torch.as_strided(flat, tensor.shape, tensor.stride).to(device)
    model = ZoomLDM(packed.config, build_networks(packed.config, "meta"))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


class DenoiserActor:
    """One replica: a LocalDenoiser on its own device. Calls are pure, so any may be repeated anywhere."""

    def __init__(self, threads: int, device: str) -> None:
        pin_arithmetic(threads)
        keep_freed_memory(device)
        self.device = device
        self._local: LocalDenoiser | None = None
        self._wide: LocalDenoiser | None = None

    def load(self, packed: PackedModel) -> ReplicaInfo:
        """Take the weights; Ray turns the reference it is called with into the value.

        A call and not the constructor: an error here keeps its own type and text, one there only says "actor died".
        """
        self._local = LocalDenoiser(unpack_model(packed, self.device))
        return ReplicaInfo(os.getpid(), socket.gethostname(), hardware_of(self.device))

    def denoise(self, batch: TileBatch, float32: bool = False) -> Answer:
        """Evaluate a batch; `float32` widens a 16-bit model for this call."""
        writable = replace(batch, x_t=batch.x_t.copy(), cells=batch.cells.copy())
        if batch.newton is not None:
            writable = replace(writable, newton=replace(batch.newton, target=batch.newton.target.copy()))
        return _timed(self._denoiser(float32).denoise_batch, writable)

    def decode(self, batch: DecodeBatch, float32: bool = False) -> Answer:
        """Decode a batch of latent windows; `float32` as in denoise."""
        return _timed(self._denoiser(float32).decode_batch, replace(batch, latents=batch.latents.copy()))

    def encode(self, batch: EncodeBatch, float32: bool = False) -> Answer:
        """Enlarge a guide over a batch of tiles and encode it; `float32` as in denoise."""
        writable = replace(batch, guide=replace(batch.guide, px=batch.guide.px.copy()))
        return _timed(self._denoiser(float32).encode_batch, writable)

    def _denoiser(self, float32: bool) -> LocalDenoiser:
        if self._local is None:
            raise RuntimeError("load must be called before the first batch.")
        if not float32 or self._local.model.dtype.itemsize >= 4:
            return self._local
        if self._wide is None:
            self._wide = LocalDenoiser(copy.deepcopy(self._local.model).to(torch.float32))
        return self._wide


def _timed(
    function: Callable[..., TilePrediction | DecodedBatch | EncodedBatch], batch: TileBatch | DecodeBatch | EncodeBatch
) -> Answer:
    """Call and time; arrays that come from Ray are read-only, so the callers above hand over copies torch may wrap."""
    start = time.perf_counter()
    value = function(batch)
    return Answer(value, time.perf_counter() - start)
