"""What can be trained on a prepared set, by the type of its configuration. It knows no command lines nor Ray."""

from engine.training import joint, vq
from engine.training.gradients import Group
from engine.training.joint_settings import JointConfig
from engine.training.learning import ALONE
from engine.training.vq_settings import VQConfig

TaskConfig = JointConfig | VQConfig
TASKS: dict[str, type[JointConfig] | type[VQConfig]] = {"denoiser": JointConfig, "autoencoder": VQConfig}
"""By the value of `task`."""


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
