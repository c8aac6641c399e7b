"""Who trains on a prepared set."""

from engine.core.config import RayConfig
from engine.core.runtime import announce_address, this_process
from engine.training.precision import settle_precision
from engine.training.tasks import PreparedConfig, learn


def train_model(config: PreparedConfig) -> None:
    """Train on a prepared set: in this process, or on the workers of a Ray cluster. Raises: EngineError."""
    if not config.ray.enabled:
        learn(settle_precision(config, this_process(config.device)))
        return
    announce_address(config.ray.address)
    from actors.backend import hardware_of_replicas
    from actors.training import train_on_ray

    asked = RayConfig(address=config.ray.address)
    train_on_ray(settle_precision(config, lambda: hardware_of_replicas(asked, config.device)))
