"""What can be trained, by the name that the key `task` gives; the first is the default.

It does not train.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from engine.training.autoencoder import train as autoencoder_training
from engine.training.autoencoder.settings import VQConfig
from engine.training.cdm.settings import CDMTrainingConfig
from engine.training.cdm.train import train_cdm
from engine.training.demo.run import train
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import JointConfig
from engine.training.gradients import Group
from engine.training.settings import DemoConfig
from engine.training.text.settings import TextTrainingConfig
from engine.training.text.train import train_text
from engine.training.trainer import ALONE

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
    "text": Task(TextTrainingConfig, train_text),
    "denoiser": Task(JointConfig, denoiser_training.train, denoiser_training.export),
    "autoencoder": Task(VQConfig, autoencoder_training.train, autoencoder_training.export),
}


def learn(config: PreparedConfig, group: Group = ALONE) -> None:
    """Train, or continue, on a prepared set as one worker of a group, and write the model. Raises: EngineError."""
    TASKS[config.task].train(config, group)
