"""What can be trained, by the name that the key `task` gives; the first is the default.

It does not train.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from engine.training import joint, vq
from engine.training.cdm import train_cdm
from engine.training.cdm_settings import CDMTrainingConfig
from engine.training.gradients import Group
from engine.training.joint_settings import JointConfig
from engine.training.learning import ALONE
from engine.training.run import train
from engine.training.settings import DemoConfig
from engine.training.vq_settings import VQConfig

PreparedConfig = JointConfig | VQConfig
"""Of what is trained on a prepared set, alone or by a group of workers."""


class Task(NamedTuple):
    """One thing that can be trained."""

    schema: type[Any]
    train: Callable[..., None]
    """Takes the configuration; on a prepared set also a group of workers."""
    export: Callable[[Any], None] | None = None
    """Writes the model of the last checkpoint of a training on a prepared set."""


TASKS = {
    "demo": Task(DemoConfig, train),
    "cdm": Task(CDMTrainingConfig, train_cdm),
    "denoiser": Task(JointConfig, joint.train, joint.export),
    "autoencoder": Task(VQConfig, vq.train, vq.export),
}


def learn(config: PreparedConfig, group: Group = ALONE) -> None:
    """Train, or continue, on a prepared set as one worker of a group, and write the model. Raises: EngineError."""
    TASKS[config.task].train(config, group)
