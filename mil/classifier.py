"""MILClassifier: models of bags as a scikit-learn estimator, for bags in files or in memory.

A bag is an array (N, D) or any `mil.dataset.Bag`. It knows patients only as `groups`. Works with clone, cross_val_score
and GridSearchCV; pass patients as `groups` to both the splitter and, through `params={"groups": ...}`, to `fit`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.utils.validation import check_is_fitted

from mil.calibration import Calibration, choose_threshold, fit_calibration
from mil.dataset import Bag, as_bags
from mil.errors import CohortError, SplitError
from mil.models import BagModel, ModelConfig, build_model
from mil.training import (
    BagTraining,
    EpochRecord,
    Part,
    Precision,
    Scaling,
    TrainingConfig,
    attention_of,
    fit_scale,
    judge,
    reproducible,
)

Watch = Callable[[EpochRecord], None]
Values = Sequence[Any] | NDArray[Any]


def choose_device(name: str) -> torch.device:
    """Return the device of that name; auto takes a GPU when there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


class MILClassifier(ClassifierMixin, BaseEstimator):
    """Two classes of bags. `fit` sets patients apart, to stop the training, calibrate and choose the threshold.

    Parameters are those of TrainingConfig and ModelConfig; `widths` are the lengths of the scales that instances are
    joined from (None: the bags say), needed by "abmil_branches" for plain arrays.
    """

    def __init__(  # noqa: PLR0913 - scikit-learn's get_params wants every parameter here
        self,
        model: str = "abmil",
        *,
        widths: tuple[int, ...] | None = None,
        hidden: int = 256,
        attention: int = 128,
        dropout: float = 0.25,
        epochs: int = 60,
        patience: int = 12,
        batch_size: int = 4,
        instances: int | None = 4096,
        lr: float = 2e-4,
        weight_decay: float = 1e-4,
        clip: float = 5.0,
        class_weight: Literal["balanced", "none"] = "balanced",
        scaling: Scaling = "standardize",
        precision: Precision = "float32",
        deterministic: bool = True,
        validation: float = 0.2,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.model, self.widths = model, widths
        self.hidden, self.attention, self.dropout = hidden, attention, dropout
        self.epochs, self.patience, self.batch_size, self.instances = epochs, patience, batch_size, instances
        self.lr, self.weight_decay, self.clip, self.class_weight = lr, weight_decay, clip, class_weight
        self.deterministic = deterministic
        self.scaling: Scaling = scaling
        self.precision: Precision = precision
        self.validation, self.device, self.seed = validation, device, seed

    def fit(
        self,
        bags: Sequence[Any],
        y: Values,
        groups: Values | None = None,
        validation_set: Part | None = None,
        watch: Watch | None = None,
    ) -> Self:
        """Train on bags with labels y; `groups` are patients (each bag its own, if None).

        `validation_set` replaces the share that is set apart otherwise; its labels are 0 and 1.
        Raises: CohortError, SplitError, TrainingError; ValueError for parameters out of range.
        """
        whole = self._part(bags, y, groups)
        train, validation = (whole, validation_set) if validation_set else self._set_apart(whole)
        device = choose_device(self.device)
        settings = self._settings(TrainingConfig)
        with reproducible(self.seed, self.deterministic):
            self.model_ = build_model(self._model_config(train.bags))
            if self.scaling != "none":
                fit_scale(self.model_.features, train.bags, self.seed)
            self.history_ = BagTraining(self.model_, settings, train, self.seed, device).run(validation, watch)
            _, logit, labels = validation.by_group(self._judge(validation.bags))
        self.calibration_ = fit_calibration(logit, labels)
        self.threshold_ = choose_threshold(self.calibration_(logit), labels)
        self.n_features_in_ = self.model_.config.width
        return self

    def decision_function(self, bags: Sequence[Any]) -> NDArray[np.float64]:
        """Return the logit of each bag, (n,), not calibrated."""
        check_is_fitted(self, "model_")
        found = as_bags(bags)
        for bag in found:
            if bag.widths != self.model_.config.widths and sum(bag.widths) != self.model_.config.width:
                raise CohortError(
                    f"bags must be {self.model_.config.width} wide, as in training; {bag.name} is {sum(bag.widths)}. "
                    "Use the same encoder and scales."
                )
        with reproducible(self.seed, self.deterministic):
            return self._judge(found)

    def predict_proba(self, bags: Sequence[Any]) -> NDArray[np.float64]:
        """Return calibrated probabilities (n, 2), in the order of `classes_`."""
        positive = self.calibration_(self.decision_function(bags))
        return np.stack([1 - positive, positive], axis=1)

    def predict(self, bags: Sequence[Any]) -> NDArray:
        """Return the class of each bag, by the threshold chosen on validation patients."""
        return self.classes_[(self.predict_proba(bags)[:, 1] >= self.threshold_).astype(int)]

    def attention_maps(self, bags: Sequence[Any]) -> Iterator[NDArray[np.float32]]:
        """Yield the attention of each bag's instances, (N,), which sums to one."""
        check_is_fitted(self, "model_")
        with reproducible(self.seed, self.deterministic):
            for _, attention in attention_of(self.model_, as_bags(bags), self._device(), self.precision):
                yield attention

    def _judge(self, bags: Sequence[Bag]) -> NDArray[np.float64]:
        return judge(self.model_, bags, self._device(), self.precision)

    def _device(self) -> torch.device:
        return next(self.model_.parameters()).device

    def _settings(self, kind: type[TrainingConfig]) -> TrainingConfig:
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def _model_config(self, bags: Sequence[Bag]) -> ModelConfig:
        widths = self.widths or bags[0].widths
        if sum(widths) != sum(bags[0].widths):
            raise CohortError(f"widths must add up to {sum(bags[0].widths)}, the bags' width; got {widths}.")
        whiten = self.scaling == "whiten"
        return ModelConfig(self.model, tuple(widths), self.hidden, self.attention, self.dropout, whiten)

    def _part(self, bags: Sequence[Any], y: Values, groups: Values | None) -> Part:
        found, labels = as_bags(bags), np.asarray(y)
        owners = np.arange(len(found)) if groups is None else np.asarray(groups)
        if not len(found) == len(labels) == len(owners):
            raise CohortError(
                f"bags, y and groups must be equally many; got {len(found)}, {len(labels)}, {len(owners)}. Check them."
            )
        self.classes_ = np.unique(labels)
        if len(self.classes_) != 2:
            raise CohortError(f"y must hold two classes; got {len(self.classes_)}. Only binary tasks can be learnt.")
        truth = (labels == self.classes_[1]).astype(np.int64)
        names, owner = np.unique(owners, return_inverse=True)
        torn = names[np.bincount(owner, truth) % np.bincount(owner) > 0]
        if len(torn):
            raise CohortError(f"a patient (group) must have one label; {torn[0]} has two. Correct y or groups.")
        return Part(found, truth, owners)

    def _set_apart(self, whole: Part) -> tuple[Part, Part]:
        """Divide into training and validation, patients whole and classes in proportion."""
        smallest = min(len(set(whole.groups[whole.labels == label])) for label in (0, 1))
        parts = min(round(1 / self.validation), smallest)
        if parts < 2:
            raise SplitError(
                f"each class needs at least 2 patients, one to train on and one to validate on; got {smallest}. Give "
                "more bags, or a validation_set."
            )
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=self.seed)
        train, validation = next(splitter.split(whole.labels, whole.labels, whole.groups))

        def pick(rows: NDArray) -> Part:
            return Part([whole.bags[i] for i in rows], whole.labels[rows], whole.groups[rows])

        if len(set(whole.labels[validation])) < 2 or len(set(whole.labels[train])) < 2:
            raise SplitError(
                f"training and validation need both classes; these {len(whole.bags)} bags do not divide so. Use "
                "another seed, more bags, or a validation_set."
            )
        return pick(train), pick(validation)


def restored(params: dict[str, Any], model: BagModel, calibration: Calibration, threshold: float) -> MILClassifier:
    """Return a fitted classifier from its stored parts; classes are 0 and 1."""
    classifier = MILClassifier(**params)
    classifier.model_, classifier.calibration_, classifier.threshold_ = model.eval(), calibration, threshold
    classifier.classes_, classifier.n_features_in_ = np.array([0, 1]), model.config.width
    return classifier
