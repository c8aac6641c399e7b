"""configs/README.md lists every configuration with the command that takes it; that one reads it, others refuse it."""

import re

import pytest

from engine.cohort.config import CohortConfig
from engine.core.cli import PROJECT_ROOT, configured, stored_value
from engine.core.errors import ConfigError
from engine.datasets.config import PrepareConfig
from engine.features.config import ExtractConfig
from engine.sampling.config import RunConfig
from engine.training.tasks import TASKS
from mil.augmentation.config import AugmentConfig
from mil.folds.config import StudyConfig

CONFIGS = PROJECT_ROOT / "configs"
ROWS = re.findall(r"^\| `(\w+\.yaml)` \| `([\w.]+)` \|", (CONFIGS / "README.md").read_text(), flags=re.MULTILINE)
SCHEMAS = {
    "generate_large.py": RunConfig,
    "engine.generate_cohort": CohortConfig,
    "engine.extract_features": ExtractConfig,
    "engine.prepare": PrepareConfig,
    "mil.train": StudyConfig,
    "mil.augment": AugmentConfig,
}


def schema_of(command: str, name: str) -> type:
    return (
        TASKS[str(stored_value(CONFIGS / name, "task", ""))].schema if command == "engine.train" else SCHEMAS[command]
    )


def test_the_table_lists_every_file() -> None:
    assert sorted(name for name, _ in ROWS) == sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(("name", "command"), ROWS)
def test_the_command_of_the_table_reads_the_file(name: str, command: str) -> None:
    assert isinstance(configured(schema_of(command, name), CONFIGS / name), schema_of(command, name))


@pytest.mark.parametrize("name", [name for name, command in ROWS if command == "engine.train"])
def test_another_commands_file_is_refused_with_the_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a known (key|flag|section)"):
        configured(RunConfig, CONFIGS / name)
