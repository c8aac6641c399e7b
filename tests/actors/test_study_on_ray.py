"""A study whose folds were shared out on Ray is, to the byte, the study done in one process."""

from pathlib import Path

import pytest

from engine._backends.jobs import on_ray
from engine.core.runtime import one_by_one
from mil.fit.training import TrainingConfig
from mil.folds.config import ModelSection, StudyConfig, StudyOutput
from mil.study import prepare, run
from tests.support.known_cohort import write_cohort


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_bytes(tmp_path: Path) -> None:
    known = write_cohort(tmp_path, 20)
    said: list[str] = []
    for name in ("alone", "ray"):
        config = StudyConfig(
            features=str(known.features),
            labels=str(known.labels),
            folds=2,
            device="cpu",
            model=ModelSection(hidden=8, attention=4),
            training=TrainingConfig(epochs=2, batch_size=8),
            output=StudyOutput(str(tmp_path / name)),
        )
        run(prepare(config), on_ray(config) if name == "ray" else one_by_one, said.append)
    assert sum("done (" in line for line in said) == 4
    names = ["metrics.json", *(f"folds/repeat0_fold{k}/{file}" for k in (0, 1)
             for file in ("model.safetensors", "predictions.csv", "history.csv"))]  # fmt: skip
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
