"""A small study on a known cohort, as a configuration and as flags."""

from dataclasses import replace
from pathlib import Path

from mil.fit.training import TrainingConfig
from mil.folds.config import ModelSection, StudyConfig, StudyOutput
from tests.support.known_cohort import KnownCohort

QUICK = [
    *("--folds=2", "--ray.enabled=false", "--device=cpu", "--training.epochs=12", "--training.lr=0.01"),
    *("--training.batch_size=8", "--model.hidden=16", "--model.attention=8", "--model.dropout=0"),
]


def config_of(known: KnownCohort, folder: Path, **changes: object) -> StudyConfig:
    config = StudyConfig(
        features=str(known.features),
        labels=str(known.labels),
        folds=2,
        device="cpu",
        model=ModelSection(hidden=16, attention=8, dropout=0.0),
        training=TrainingConfig(epochs=12, lr=0.01, batch_size=8),
        output=StudyOutput(str(folder)),
    )
    return replace(config, **changes)  # type: ignore[arg-type]
