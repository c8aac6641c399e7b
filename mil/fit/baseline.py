"""The baseline every report shows: the mean of a bag's instances and a logistic regression.

A model that looks at instances has to beat it. Same interface as MILClassifier; bags are read once each.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from mil.data.dataset import as_bags
from mil.fit.calibration import all_columns, called, choose_threshold, fit_calibration
from mil.fit.training import Part, Scaling, fit_scale
from mil.models.contract import FeatureScale


class MeanPoolClassifier(ClassifierMixin, BaseEstimator):
    """Logistic regression on standardised bag means.

    c: scikit-learn's inverse strength of regularisation. scaling: whiten decorrelates the features of each scale first,
    as MILClassifier does, so that the two differ by attention alone.
    """

    def __init__(self, c: float = 0.1, seed: int = 0, scaling: Scaling = "standardize") -> None:
        self.c, self.seed, self.scaling = c, seed, scaling

    def fit(
        self,
        bags: Sequence[Any],
        y: Sequence[Any] | NDArray[Any],
        groups: Any = None,
        validation_set: Part | None = None,
    ) -> Self:
        """Fit on bags with labels y; `validation_set` (else these bags) calibrates and chooses the threshold."""
        del groups  # the regression has no part that is set apart
        labels = np.asarray(y)
        self.classes_ = np.unique(labels)
        regression = LogisticRegression(C=self.c, class_weight="balanced", max_iter=2000, random_state=self.seed)
        instances = as_bags(bags)
        self.features_ = FeatureScale(instances[0].widths, whiten=self.scaling == "whiten")
        fit_scale(self.features_, instances, self.seed)
        # Scaling is linear: the mean of scaled instances is the scaled mean.
        self.pipeline_: Pipeline = make_pipeline(StandardScaler(), regression).fit(self._means(instances), labels)
        truth = np.searchsorted(self.classes_, labels)
        judged = validation_set or Part(as_bags(bags), truth, np.arange(len(labels)))
        _, logit, truth = judged.by_group(self.decision_function(judged.bags))
        self.calibration_ = fit_calibration(logit, truth)
        self.threshold_ = choose_threshold(self.calibration_(logit), truth) if logit.ndim == 1 else None
        return self

    def decision_function(self, bags: Sequence[Any]) -> NDArray[np.float64]:
        """Return the logit of each bag, (n,), of more than two classes (n, classes)."""
        check_is_fitted(self, "pipeline_")
        return self.pipeline_.decision_function(self._means(bags))

    @torch.inference_mode()
    def _means(self, bags: Sequence[Any]) -> NDArray[np.float64]:
        """Return the mean instance of each bag, scaled: (n, D)."""
        means = np.stack([bag.read().mean(axis=0, dtype=np.float64) for bag in as_bags(bags)])
        return self.features_(torch.from_numpy(means).float()).double().numpy()

    def predict_proba(self, bags: Sequence[Any]) -> NDArray[np.float64]:
        """Return calibrated probabilities (n, classes)."""
        return all_columns(self.calibration_(self.decision_function(bags)))

    def predict(self, bags: Sequence[Any]) -> NDArray:
        """Return the class of each bag."""
        return self.classes_[called(self.calibration_(self.decision_function(bags)), self.threshold_)]
