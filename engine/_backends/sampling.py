"""Who denoises tiles, and on what hardware any product is computed."""

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Protocol

from engine.core.config import ModelConfigSection, RayConfig
from engine.core.runtime import Ask, Hardware, announce_address, this_process
from engine.generation.session import Backend, StartBackend, local_backend
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig


class Places(Protocol):
    """A configuration that says which model computes, and on which cluster."""

    @property
    def model(self) -> ModelConfigSection: ...
    @property
    def ray(self) -> RayConfig: ...


def ask_hardware(config: Places) -> Ask:
    """Return what tells of the hardware that will compute: of Ray's replicas where the configuration wants Ray."""
    if config.ray.enabled:
        return partial(_hardware_of_replicas, config.ray, config.model.device)
    return this_process(config.model.device)


def _hardware_of_replicas(ray: RayConfig, device: str) -> Hardware:
    announce_address(ray.address)
    from actors.backend import hardware_of_replicas

    return hardware_of_replicas(ray, device)


def sampling_backend(config: RunConfig, connection: ExitStack) -> StartBackend:
    """Return what denoises tiles. Replicas leave with their context, Ray with `connection`, after the report."""
    return partial(_replicas, connection) if config.ray.enabled else local_backend


def _replicas(connection: ExitStack, model: ZoomLDM, config: RunConfig) -> AbstractContextManager[Backend]:
    announce_address(config.ray.address)
    from actors.backend import ray_backend

    return ray_backend(connection, model, config)
