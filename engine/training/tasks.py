"""What can be trained, by the name that the key `task` gives. It knows no command lines nor Ray."""

from collections.abc import Callable
from typing import Any, NamedTuple

from engine.training import joint, vq
from engine.training.cdm import train_cdm
from engine.training.cdm_settings import CDMTrainingConfig
from engine.training.gradients import Group
from engine.training.joint_settings import JointConfig
from engine.training.learning import ALONE
from engine.training.run import train
from engine.training.settings import TrainingConfig
from engine.training.vq_settings import VQConfig


class Alone(NamedTuple):
    """Something that one process trains."""

    schema: type[Any]
    train: Callable[[Any], None]


ALONE_TASKS = {"demo": Alone(TrainingConfig, train), "cdm": Alone(CDMTrainingConfig, train_cdm)}
"""The embedded model on phantoms, and a CDM on stored summaries."""

TaskConfig = JointConfig | VQConfig
TASKS: dict[str, type[JointConfig] | type[VQConfig]] = {"denoiser": JointConfig, "autoencoder": VQConfig}
"""What groups of workers train on a prepared set."""


def learn(config: TaskConfig, group: Group = ALONE) -> None:
    """Train, or continue, as one worker of a group, and write the model. Raises: EngineError."""
    if isinstance(config, JointConfig):
        joint.train(config, group)
    else:
        vq.train(config, group)


def write_model(config: TaskConfig) -> None:
    """Write the model of the last checkpoint. Raises: EngineError."""
    if isinstance(config, JointConfig):
        joint.export(config)
    else:
        vq.export(config)
