"""A training on the workers of a Ray cluster: they share every step, and a lost one costs the steps since a checkpoint.

Invariant: one group at a time writes the run folder. Ray's own FailureConfig is not used: it starts again after any
error, also one that comes back each time, such as a loss that is not finite or a set that does not fit.
It does not know what is trained. Source: Ray 2.60, ray.train.torch.TorchTrainer (v2).
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from actors.cluster import connect, node_resources
from engine.core.config import RayConfig
from engine.core.errors import ClusterError, EngineError, ReplicaLostError
from engine.training.gradients import Group, ProcessGroup
from engine.training.tasks import PreparedConfig, learn

log = logging.getLogger("engine.actors.training")


def train_on_ray(config: PreparedConfig) -> None:
    """Train on `config.ray.workers` workers, again from the last checkpoint when one is lost.

    Raises: the EngineError of a worker; ReplicaLostError when workers were lost too often; ClusterError.
    """
    with connect(RayConfig(address=config.ray.address), num_cpus=_private_cpus(config)):
        workers, use_gpu = _workers(config)
        log.info("training on %d workers; log.txt and log.jsonl in %s tell how it goes", workers, config.run)
        failures = 0
        while True:
            try:
                _fit(config, workers, use_gpu)
                return
            except TrainingFailedError as error:
                _raise_own_errors(error)
                failures += 1
                if failures > config.ray.max_failures:
                    raise ReplicaLostError(
                        f"the workers of a training may be lost {config.ray.max_failures} times; it was once more "
                        f"({_first_line(error)}). If memory ran out, raise train.accumulate. Every checkpoint is "
                        f"kept: the same command continues."
                    ) from error
                log.warning("a worker was lost (%s); starting again from the last checkpoint", _first_line(error))


def _private_cpus(config: PreparedConfig) -> int | None:
    """Return the CPUs of a private Ray: what the workers take, if they are counted."""
    return config.ray.workers * config.ray.cpus_per_worker if config.ray.workers else None


def _workers(config: PreparedConfig) -> tuple[int, bool]:
    """Return how many workers there are, and whether each has a GPU. Raises: ClusterError if they never fit."""
    nodes = node_resources()
    gpus = int(sum(node.gpus for node in nodes))
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    workers = config.ray.workers or (gpus if use_gpu else 1)
    fitting = sum(int(node.cpus // config.ray.cpus_per_worker) for node in nodes)
    if workers > fitting or (use_gpu and not 0 < workers <= gpus):
        raise ClusterError(
            f"{workers} workers of {config.ray.cpus_per_worker} CPU{' and a GPU' if use_gpu else ''} each must fit "
            f"into the cluster; it has {'; '.join(map(str, nodes))}. Lower ray.workers or ray.cpus_per_worker."
        )
    return workers, use_gpu


def _fit(config: PreparedConfig, workers: int, use_gpu: bool) -> None:
    """Train until the end or the loss of a worker. Raises: ray's TrainingFailedError."""
    share = {"CPU": config.ray.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    TorchTrainer(
        _work,
        train_loop_config={"config": config, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=share),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(name="workers", storage_path=str(Path(config.run).resolve() / "ray")),
    ).fit()


def _work(job: dict[str, Any]) -> None:
    """Train as one worker of the group that Ray has set up."""
    if Path(job["folder"]).is_dir():
        os.chdir(job["folder"])  # relative paths mean what they mean to the driver, where its folder is to be seen
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    config, context = job["config"], ray.train.get_context()
    if context.get_world_rank() == 0:  # the driver, which has the terminal, hears nothing of the workers
        logging.getLogger("engine").addHandler(logging.FileHandler(Path(config.run) / "log.txt"))
    learn(config, Group() if context.get_world_size() == 1 else ProcessGroup())


def _raise_own_errors(error: TrainingFailedError) -> None:
    """Raise what our code raised on a worker, unless it followed from the loss of another one."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    for failure in failures:
        if isinstance(failure, EngineError):
            raise failure from None
    if not any(_is_rays_own(failure) or _is_silence(failure) for failure in failures):
        raise error


def _is_rays_own(error: BaseException) -> bool:
    """Say whether an error is Ray's word for a lost worker and not raised by a worker; its classes are not public."""
    return type(error).__module__.partition(".")[0] == "ray"


def _is_silence(error: BaseException) -> bool:
    """Say whether an error means that another worker does not answer; gloo raises bare RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
