"""A small cohort of three classes on disk: no sign, a fine sign, a fine and a coarse one."""

from pathlib import Path

from tests.support.known_cohort import KnownCohort, write_slide, write_table

GRADES = ("low", "mid grade", "high")
TASK = (
    "name: grade\neach: [grade == low, grade == 'mid grade', grade == high]\nclasses: [low, mid grade, high]\n"
    "metrics: [auroc, balanced_accuracy]\n"
)


def write_grades(folder: Path, patients: int = 30) -> tuple[KnownCohort, Path]:
    """Write features, labels.csv and the task; return the cohort and the task's file. One slide is of no grade."""
    features = folder / "features"
    features.mkdir(parents=True)
    rows, truth = [], {}
    for number in range(patients):
        grade, name = number % 3, f"G{number:03d}"
        write_slide(features, name, grade > 0, grade == 2, number)
        rows.append({"patient": name, "slide": name, "grade": GRADES[grade]})
        truth[name] = grade
    write_slide(features, "G900", True, True, 900)
    rows.append({"patient": "G900", "slide": "G900", "grade": "unheard of"})
    write_table(folder / "labels.csv", rows)
    (folder / "task.yaml").write_text(TASK)
    return KnownCohort(features, folder / "labels.csv", truth), folder / "task.yaml"
