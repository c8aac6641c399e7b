"""Inception-v3 as FID papers use it, for figures beside theirs; the user brings the weights.

Invariant: every tensor of the network comes from the file, which is read as data. The file is the well-known port of
TensorFlow's graph of 2015-12-05 (a state dict; names as below). Not held against published activations here: no weights
were at hand; the test checks names, shapes and that the file is read as data.
Source: Szegedy et al. 2015; Heusel et al. 2017. TensorFlow's graph differs from the paper's network in its pools: means
leave padding out of the count, and the last block has a maximum.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.model.encoders.base import NetworkEncoder
from engine.model.weights.folder import check_fit, read_safetensors
from engine.model.weights.ldm_import import load_tensors

INPUT_PX, WIDTH = 299, 2048
Side = int | tuple[int, int]
_ROW_7: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
_COLUMN_7: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
_ROW_3: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
_COLUMN_3: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
_CLASSES = 1008
"""Of the classifier in the file, which is read and not used."""


class _Convolution(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, taken: int, made: int, kernel: Side, stride: int = 1, padding: Side = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(taken, made, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(made, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Paths(nn.Module):
    """Paths side by side: each a list of names in order; a name in brackets forks in two."""

    def __init__(self, paths: dict[str, _Convolution], order: tuple, pool: str | None) -> None:
        super().__init__()
        for name, convolution in paths.items():
            self.add_module(name, convolution)
        self._order, self._pool = order, pool

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for names in self._order:
            value = _pooled(x, self._pool) if names and names[0] == "branch_pool" else x
            for name in names:
                if isinstance(name, tuple):
                    value = torch.cat([self.get_submodule(n)(value) for n in name], dim=1)
                else:
                    value = self.get_submodule(name)(value)
            found.append(value)
        if self._pool == "reduce":
            found.append(F.max_pool2d(x, 3, 2))
        return torch.cat(found, dim=1)


def _pooled(x: Tensor, how: str | None) -> Tensor:
    if how == "max":
        return F.max_pool2d(x, 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _five(taken: int, pool: int) -> _Paths:
    """Mixed_5: 1×1, 5×5, two 3×3, mean."""
    c = _Convolution
    paths = {
        "branch1x1": c(taken, 64, 1), "branch5x5_1": c(taken, 48, 1), "branch5x5_2": c(48, 64, 5, padding=2),
        "branch3x3dbl_1": c(taken, 64, 1), "branch3x3dbl_2": c(64, 96, 3, padding=1),
        "branch3x3dbl_3": c(96, 96, 3, padding=1), "branch_pool": c(taken, pool, 1),
    }  # fmt: skip
    order = (
        ("branch1x1",), ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("branch_pool",),
    )  # fmt: skip
    return _Paths(paths, order, "mean")


def _six_reduced() -> _Paths:
    """Mixed_6a: 3×3 and two 3×3 of stride 2, maximum."""
    c = _Convolution
    paths = {
        "branch3x3": c(288, 384, 3, 2), "branch3x3dbl_1": c(288, 64, 1), "branch3x3dbl_2": c(64, 96, 3, padding=1),
        "branch3x3dbl_3": c(96, 96, 3, 2),
    }  # fmt: skip
    return _Paths(paths, (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")), "reduce")


def _six(width: int) -> _Paths:
    """Mixed_6b … 6e: 1×1, one and two 7×7 in rows and columns, mean."""
    c, row, column = _Convolution, _ROW_7, _COLUMN_7
    paths = {
        "branch1x1": c(768, 192, 1), "branch7x7_1": c(768, width, 1), "branch7x7_2": c(width, width, **row),
        "branch7x7_3": c(width, 192, **column), "branch7x7dbl_1": c(768, width, 1),
        "branch7x7dbl_2": c(width, width, **column), "branch7x7dbl_3": c(width, width, **row),
        "branch7x7dbl_4": c(width, width, **column), "branch7x7dbl_5": c(width, 192, **row),
        "branch_pool": c(768, 192, 1),
    }  # fmt: skip
    order = (
        ("branch1x1",), ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        tuple(f"branch7x7dbl_{i}" for i in range(1, 6)), ("branch_pool",),
    )  # fmt: skip
    return _Paths(paths, order, "mean")


def _seven_reduced() -> _Paths:
    """Mixed_7a: 3×3 and 7×7 with 3×3 of stride 2, maximum."""
    c = _Convolution
    paths = {
        "branch3x3_1": c(768, 192, 1), "branch3x3_2": c(192, 320, 3, 2), "branch7x7x3_1": c(768, 192, 1),
        "branch7x7x3_2": c(192, 192, (1, 7), padding=(0, 3)), "branch7x7x3_3": c(192, 192, (7, 1), padding=(3, 0)),
        "branch7x7x3_4": c(192, 192, 3, 2),
    }  # fmt: skip
    order = (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in range(1, 5)))
    return _Paths(paths, order, "reduce")


def _seven(taken: int, pool: str) -> _Paths:
    """Mixed_7b, 7c: 1×1, 3×3 and two 3×3, both forked in rows and columns, mean or maximum."""
    c, row, column = _Convolution, _ROW_3, _COLUMN_3
    paths = {
        "branch1x1": c(taken, 320, 1), "branch3x3_1": c(taken, 384, 1), "branch3x3_2a": c(384, 384, **row),
        "branch3x3_2b": c(384, 384, **column), "branch3x3dbl_1": c(taken, 448, 1),
        "branch3x3dbl_2": c(448, 384, 3, padding=1), "branch3x3dbl_3a": c(384, 384, **row),
        "branch3x3dbl_3b": c(384, 384, **column), "branch_pool": c(taken, 192, 1),
    }  # fmt: skip
    order = (
        ("branch1x1",), ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")), ("branch_pool",),
    )  # fmt: skip
    return _Paths(paths, order, pool)


class Inception(nn.Module):
    """Pictures in [−1, 1], (B, 3, 299, 299) → (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        c = _Convolution
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = c(3, 32, 3, 2), c(32, 32, 3)
        self.Conv2d_2b_3x3 = c(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = c(64, 80, 1), c(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _five(192, 32), _five(256, 64), _five(288, 64)
        self.Mixed_6a = _six_reduced()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _six(128), _six(160), _six(160), _six(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _seven_reduced(), _seven(1280, "mean"), _seven(2048, "max")
        self.fc = nn.Linear(WIDTH, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


class InceptionEncoder(NetworkEncoder):
    """The network behind the SSLEncoder protocol; `id` is "inception"."""

    id = "inception"

    def __init__(self, network: Inception) -> None:
        super().__init__(network, WIDTH)

    def _vectors(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        light = F.interpolate(images.to(dtype), size=INPUT_PX, mode="bilinear", align_corners=False)
        return self.network((light - 128) / 128)


def load_inception(path: Path, device: str = "cpu") -> InceptionEncoder:
    """Read the weights: a state dict (.pth, read as data) or safetensors.

    Raises: CheckpointError if the file is missing, damaged, hostile or another network.
    """
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    with torch.device("meta"):
        network = Inception()
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    # Counters of batches seen in training; old files lack them, and nothing uses them.
    counters = {n: torch.zeros((), dtype=torch.int64) for n in wanted if n.endswith("num_batches_tracked")}
    named = {**counters, **tensors}
    check_fit({name: value.shape for name, value in named.items()}, wanted, str(path))
    network.load_state_dict({name: value.to(device, copy=True) for name, value in named.items()}, assign=True)
    return InceptionEncoder(network)
