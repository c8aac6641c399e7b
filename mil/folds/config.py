"""Configuration of command 3: one frozen dataclass per YAML section, valid by construction.

It knows ranges and units, not tables, files or models. Keys map 1:1 to fields and to command-line flags.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from engine.core.config import RayConfig
from mil.data.dataset import Coarse
from mil.fit.training import TrainingConfig


@dataclass(frozen=True)
class ModelSection:
    """Which model of bags."""

    name: Literal["abmil", "clam_sb", "dsmil", "transmil", "simlp"] = "abmil"
    """abmil (gated attention), clam_sb, dsmil, transmil, or simlp (mean pool and a perceptron). The mean-pool baseline
    is always made as well."""
    fusion: Literal["join", "branches"] = "join"
    """With several scales: join each fine tile with its parent's vector, or an attention branch per scale (abmil)."""
    hidden: int = 256
    """Width of an embedded instance."""
    attention: int = 128
    """Width of the attention's hidden layer."""
    dropout: float = 0.25
    """Share of embedded values dropped in training, 0..1."""

    def __post_init__(self) -> None:
        if self.fusion == "branches" and self.name != "abmil":
            raise ValueError(f"model.fusion=branches is a form of abmil; got model.name={self.name}. Use join.")
        if min(self.hidden, self.attention) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "model.hidden and model.attention must be at least 1, model.dropout in 0..1; got "
                f"{self.hidden}, {self.attention}, {self.dropout}."
            )

    @property
    def architecture(self) -> str:
        """Return the name in mil.models.MODELS."""
        return "abmil_branches" if self.fusion == "branches" else self.name


@dataclass(frozen=True)
class StudyOutput:
    """Where the study lives."""

    folder: str | None = None
    """Run folder; a matching unfinished study in it is continued. None: runs/mil/TASK."""


@dataclass(frozen=True)
class BaseStudyConfig:
    """Bags, labels, folds and a model: what a study and the augmentation protocol have in common."""

    task: str = "hrd"
    """Name of a task in configs/tasks/, or a YAML file like those."""
    features: str | None = None
    """Folder of features files: ours, or those of TRIDENT, CLAM or STAMP."""
    labels: str | None = None
    """Table (.csv, .tsv) with the task's columns."""
    scales: str | None = None
    """Magnifications to learn from, such as 20,5 or 5; None takes all that the files hold."""
    coarse: Coarse = "stored"
    """Where coarser scales' vectors come from. pooled is a control: each is replaced by the mean of the finest scale's
    vectors inside it, so what `stored` adds to it is more than pooling."""
    folds: int | None = None
    """Replaces split.folds of the task."""
    repeats: int | None = None
    """Replaces split.repeats of the task."""
    skip_missing: bool = False
    """Leave labelled slides without features out, and list them, instead of stopping."""
    seed: int = 0
    """Seed of the split, the weights, the sampling and the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models are trained; auto takes a GPU when there is one."""
    threads: int = 1
    """CPU threads of each training; pinned, because it changes the last bits."""
    memory_mb: int = 4096
    """Features kept in memory per process; what does not fit is read again each epoch."""
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    output: StudyOutput = field(default_factory=StudyOutput)

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("memory_mb", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        _ = self.scale_names

    @property
    def scale_names(self) -> tuple[str, ...] | None:
        """Return the scales fine to coarse, as the files name them ("20x"). Raises ValueError."""
        if self.scales is None:
            return None
        try:
            values = [float(part.strip().removesuffix("x")) for part in str(self.scales).split(",")]
        except ValueError as error:
            raise ValueError(f"scales must be magnifications such as 20,5; got {self.scales!r}.") from error
        if len(set(values)) != len(values) or not min(values) > 0:
            raise ValueError(f"scales must be different magnifications above 0; got {self.scales!r}.")
        return tuple(f"{value:g}x" for value in sorted(values, reverse=True))

    def classifier(self) -> dict[str, object]:
        """Return the parameters of MILClassifier."""
        section = asdict(self.model)
        del section["name"], section["fusion"]
        return {"model": self.model.architecture, **section, **asdict(self.training),
                "device": self.device, "seed": self.seed}  # fmt: skip


@dataclass(frozen=True)
class StudyConfig(BaseStudyConfig):
    """Everything command 3 needs, as stored in config.yaml."""

    splits: str | None = None
    """A split to use instead of drawing one: splits.csv of a run, or CLAM's splits_K.csv (one, or their folder)."""
    slides: str | None = None
    """Folder of the slides themselves, to show the most attended tiles as pictures in the report; nothing else reads
    them. May be given to a finished study, whose report is then written again."""
    simlp: bool = False
    """Train SiMLP (mean pool and a perceptron) in each fold as a second baseline, with the model's settings."""

    def deciding_keys(self) -> dict[str, object]:
        """Return the keys that decide the figures, dotted; the others may change when a study is continued."""
        kept = {k: v for k, v in asdict(self).items() if k in ("scales", "skip_missing", "seed", "device", "threads")}
        for section in ("model", "training"):
            kept |= {f"{section}.{k}": v for k, v in asdict(getattr(self, section)).items()}
        # Earlier studies lack these keys and are continued all the same.
        plain = StudyConfig()
        return kept | {k: getattr(self, k) for k in ("coarse", "simlp") if getattr(self, k) != getattr(plain, k)}
