"""How the gradient of a step is computed: part after part, and over a group of workers.

Invariant: what is left in the parameters is the gradient of the mean loss of the whole step, however it was parted.
It does not know optimisers, images or latents.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class LossOfStep(Protocol):
    """The loss of one part of one step; everything random in it is drawn from step and part."""

    def __call__(self, step: int, part: int, /) -> tuple[Tensor, dict[str, float]]: ...


class Gradients(Protocol):
    """Leaves the gradient of a step's mean loss, times the scaler's scale, in the parameters."""

    scaler: torch.amp.GradScaler

    def __call__(self, loss_of: LossOfStep, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss, the same on every worker, and the first part's figures."""
        ...


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    return [p for p in module.parameters() if p.requires_grad]


class Group:
    """The workers of a run, here this process alone; every worker must make the same calls in the same order."""

    rank, size = 0, 1

    def join(self, module: nn.Module) -> Callable[..., Any]:
        """Return what to call instead of the module, so that gradients are averaged over the group."""
        return module

    def apart(self) -> AbstractContextManager[None]:
        """Inside, gradients stay with the worker; for all parts of a step but the last."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the workers."""
        return value

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the workers."""
        return value

    def agree(self, value: int) -> bool:
        """Say whether all workers have the same number."""
        del value
        return True


class ProcessGroup(Group):
    """The workers of torch.distributed's default process group, which somebody has set up."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._joined: list[DistributedDataParallel] = []

    def join(self, module: nn.Module) -> Callable[..., Any]:
        # Buffers are constants here. No device_ids: inputs are on the right device already.
        self._joined.append(DistributedDataParallel(module, broadcast_buffers=False))
        return self._joined[-1]

    @contextmanager
    def _apart(self) -> Iterator[None]:
        with self._joined[-1].no_sync():
            yield

    def apart(self) -> AbstractContextManager[None]:
        return self._apart()

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value) / self.size

    def total(self, value: Tensor) -> Tensor:
        summed = value.detach().clone()
        dist.all_reduce(summed)
        return summed

    def agree(self, value: int) -> bool:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        extremes = torch.tensor([value, -value], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])


class GroupGradients:
    """Parts of a step one after the other, each forward and backward; over a group of workers the mean of theirs."""

    def __init__(self, module: nn.Module, parts: int, group: Group, scaler: torch.amp.GradScaler) -> None:
        self.module, self.parts, self.group, self.scaler = module, parts, group, scaler

    def __call__(self, loss_of: LossOfStep, step: int) -> tuple[Tensor, dict[str, float]]:
        self.module.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        first: dict[str, float] = {}
        for part in range(self.parts):
            last = part == self.parts - 1
            with nullcontext() if last else self.group.apart():
                loss, figures = loss_of(step, part)
                self.scaler.scale(loss / self.parts).backward()
            losses.append(loss.detach())
            first = first or figures
        return self.group.mean(torch.stack(losses).mean()), first
