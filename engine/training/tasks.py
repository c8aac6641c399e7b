"""What can be trained, by the name that the key `task` gives; the first is the default.

It does not train.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from engine.training.cdm import train_cdm
from engine.training.cdm_settings import CDMTrainingConfig
from engine.training.run import train
from engine.training.settings import TrainingConfig


class Task(NamedTuple):
    """One thing that can be trained."""

    schema: type[Any]
    train: Callable[[Any], None]


TASKS = {"zoomldm": Task(TrainingConfig, train), "cdm": Task(CDMTrainingConfig, train_cdm)}
