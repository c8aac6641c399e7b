"""Configuration of `python -m mil.augment`: mil.train's keys that count here, and what the arms need."""

from dataclasses import asdict, dataclass, fields

from mil.folds.config import BaseStudyConfig, StudyConfig

ARMS = ("real", "real_twice", "real_noise", "real_synthetic", "synthetic")
"""What an arm trains on: the fraction's real bags; the same twice; them and a noisy copy of each; them and synthetic
bags of their patients; synthetic bags alone. The second and third are the controls."""


@dataclass(frozen=True)
class AugmentConfig(BaseStudyConfig):
    """Everything the protocol needs, as stored in config.yaml. Features and labels are those of the real slides."""

    synthetic: str | None = None
    """Folder with cohort.csv (name, label, patient, source_patient) and synthetic bags, beside it or in features/."""
    generator: str | None = None
    """Model folder that drew the synthetic bags; its training_slides.json says which slides it saw. None: unknown."""
    fractions: tuple[float, ...] = (0.1, 0.25, 1.0)
    """Shares of each fold's training patients that are learnt from."""
    arms: tuple[str, ...] = ARMS
    """Which arms are trained: real, real_twice, real_noise, real_synthetic, synthetic."""
    noise: float = 0.5
    """Deviation of the noise of real_noise, in deviations of each feature over the arm's real training tiles."""
    amount: int | None = None
    """Synthetic bags taken of each training patient; fewer are an error. None takes all that are there."""
    wanted: str | None = None
    """CSV to write instead of training: a row for each synthetic bag that the arms need, `amount` (or one) of each
    training patient of any fold, as engine.generate_cohort --table takes them."""
    tiles: int = 1
    """Tiles that each synthetic bag must have; fewer are an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"fractions must be different shares, at least one; got {list(self.fractions)}.")
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions must lie above 0 and up to 1; got {list(self.fractions)}.")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or "real" not in self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms must be real and others of {', '.join(ARMS)}; got {', '.join(self.arms)}.")
        if not self.noise > 0:
            raise ValueError(f"noise must be positive, in deviations; got {self.noise}.")
        for name, value in (("amount", self.amount), ("tiles", self.tiles)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")

    @property
    def needs_synthetic(self) -> bool:
        return any("synthetic" in arm for arm in self.arms)

    def study(self) -> StudyConfig:
        """Return the study whose real cohort and folds the arms share."""
        return StudyConfig(**{f.name: getattr(self, f.name) for f in fields(BaseStudyConfig)})

    def deciding_keys(self) -> dict[str, object]:
        """Return the keys beside the study's that decide the figures."""
        return {k: v for k, v in asdict(self).items() if k in ("fractions", "arms", "noise", "amount", "tiles")}
