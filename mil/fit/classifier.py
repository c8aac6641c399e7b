"""MILClassifier: models of bags as a scikit-learn estimator, for bags in files or in memory.

A bag is an array (N, D) or any `mil.data.dataset.Bag`. It knows patients only as `groups`. Works with clone,
cross_val_score and GridSearchCV; pass patients as `groups` to both the splitter and, through `params={"groups": ...}`,
to `fit`.
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

from engine.core.runtime import choose_device
from mil.data.dataset import Bag, as_bags
from mil.errors import CohortError, SplitError
from mil.fit.calibration import Calibration, all_columns, called, choose_threshold, fit_calibration
from mil.fit.training import (
    BagTraining,
    EpochRecord,
    Part,
    Precision,
    Scaling,
    TrainingConfig,
    alone,
    attention_of,
    fit_scale,
    judge,
    reproducible,
)
from mil.models import BagModel, ModelConfig, build_model

EpochCallback = Callable[[EpochRecord], None]
Values = Sequence[Any] | NDArray[Any]


class MILClassifier(ClassifierMixin, BaseEstimator):
    """Two or more classes of bags. `fit` sets patients apart, to stop the training, calibrate and choose the threshold.

    Parameters are those of TrainingConfig and ModelConfig; `widths` are the lengths of the scales that instances are
    joined from (None: the bags say), needed by "abmil_branches" for plain arrays.

    >>> import mil, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(16) % 2
    >>> bags = [rng.normal(3 * label, 1, (5, 4)).astype(np.float32) for label in y]  # 5 tiles, vectors of 4
    >>> classifier = mil.MILClassifier(hidden=8, attention=4, epochs=20, lr=0.01, dropout=0.0)
    >>> float(classifier.fit(bags, y, groups=np.arange(16)).score(bags, y))
    1.0
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
        watch: EpochCallback | None = None,
    ) -> Self:
        """Train on bags with labels y; `groups` are patients (each bag its own, if None).

        `validation_set` replaces the share that is set apart otherwise; its labels are the classes' numbers, from 0.
        Raises: CohortError, SplitError, TrainingError; ValueError for parameters out of range.
        """
        whole = self._part(bags, y, groups)
        train, validation = (whole, validation_set) if validation_set else self._set_apart(whole)
        device = torch.device(choose_device(self.device, "device"))
        settings = self._settings(TrainingConfig)
        with reproducible(self.seed, self.deterministic):
            self.model_ = build_model(self._model_config(train.bags))
            if self.scaling != "none":
                fit_scale(self.model_.features, train.bags, self.seed)
            self.history_ = BagTraining(self.model_, settings, train, self.seed, device).run(validation, watch)
            _, logit, labels = validation.by_group(self._judge(validation.bags))
        self.calibration_ = fit_calibration(logit, labels)
        self.threshold_ = choose_threshold(self.calibration_(logit), labels) if logit.ndim == 1 else None
        self.n_features_in_ = self.model_.config.width
        return self

    def decision_function(self, bags: Sequence[Any]) -> NDArray[np.float64]:
        """Return the logit of each bag, (n,), of more than two classes (n, classes); not calibrated."""
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
        """Return calibrated probabilities (n, classes), in the order of `classes_`."""
        return all_columns(self.calibration_(self.decision_function(bags)))

    def predict(self, bags: Sequence[Any]) -> NDArray:
        """Return the class of each bag: of two by the threshold chosen on validation patients, else the likeliest."""
        return self.classes_[called(self.calibration_(self.decision_function(bags)), self.threshold_)]

    def attention_maps(self, bags: Sequence[Any]) -> Iterator[NDArray[np.float32]]:
        """Yield the attention of each bag's instances, (N,), which sums to one."""
        check_is_fitted(self, "model_")
        with reproducible(self.seed, self.deterministic):
            for _, attention in attention_of(self.model_, as_bags(bags), self._device(), self.precision):
                yield attention

    def class_maps(self, bags: Sequence[Any]) -> Iterator[NDArray[np.float64]]:
        """Yield what the model sees in each instance of a bag by itself: calibrated probabilities (N, classes)."""
        check_is_fitted(self, "model_")
        with reproducible(self.seed, self.deterministic):
            for bag in as_bags(bags):
                yield all_columns(self.calibration_(alone(self.model_, bag, self._device(), self.precision)))

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
        classes = len(self.classes_)
        return ModelConfig(self.model, tuple(widths), self.hidden, self.attention, self.dropout, whiten, classes)

    def _part(self, bags: Sequence[Any], y: Values, groups: Values | None) -> Part:
        found, labels = as_bags(bags), np.asarray(y)
        owners = np.arange(len(found)) if groups is None else np.asarray(groups)
        if not len(found) == len(labels) == len(owners):
            raise CohortError(
                f"bags, y and groups must be equally many; got {len(found)}, {len(labels)}, {len(owners)}. Check them."
            )
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise CohortError(f"y must hold two classes or more; got {len(self.classes_)}. Give bags of another class.")
        truth = np.searchsorted(self.classes_, labels).astype(np.int64)
        names, owner = np.unique(owners, return_inverse=True)
        some = np.zeros(len(names), np.int64)
        some[owner] = truth
        torn = np.unique(owners[some[owner] != truth])
        if len(torn):
            raise CohortError(f"a patient (group) must have one label; {torn[0]} has two. Correct y or groups.")
        return Part(found, truth, owners)

    def _set_apart(self, whole: Part) -> tuple[Part, Part]:
        """Divide into training and validation, patients whole and classes in proportion."""
        classes = range(len(self.classes_))
        smallest = min(len(set(whole.groups[whole.labels == label])) for label in classes)
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

        if min(len(set(whole.labels[rows])) for rows in (train, validation)) < len(classes):
            raise SplitError(
                f"training and validation need all classes; these {len(whole.bags)} bags do not divide so. Use "
                "another seed, more bags, or a validation_set."
            )
        return pick(train), pick(validation)


def restored(
    params: dict[str, Any], model: BagModel, calibration: Calibration, threshold: float | None
) -> MILClassifier:
    """Return a fitted classifier from its stored parts; classes are their numbers, from 0."""
    classifier = MILClassifier(**params)
    classifier.model_, classifier.calibration_, classifier.threshold_ = model.eval(), calibration, threshold
    classifier.classes_, classifier.n_features_in_ = np.arange(model.config.classes), model.config.width
    return classifier
