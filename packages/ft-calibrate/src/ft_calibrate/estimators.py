"""scikit-learn estimators: gamma as a classifier on logits, as a transformer of logits, and around any classifier.

The methods are those of `ft_calibrate.calibration.METHODS` (FTC, arXiv 2409.16223, and ours); the estimators are ours.
The word "calibration" means the bias between seen and absent logits here, not the confidence that
`sklearn.calibration.CalibratedClassifierCV` calibrates.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, TransformerMixin, clone
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted, validate_data
from vfm_core.errors import UserError

from ft_calibrate.calibration import METHODS, Calibration, fit_calibration
from ft_calibrate.groups import class_groups
from ft_calibrate.inputs import like, untensored
from ft_calibrate.label_mapping import checked_labels, column_labels, label_places
from ft_calibrate.table_checks import PROBABILITY_FLOOR

__all__ = ["AbsentClassBias", "AbsentClassCalibrator", "AbsentClassClassifier"]


class _OnLogits(BaseEstimator):
    """Parameters and fitting of the two estimators whose features are the K logits."""

    def __init__(
        self,
        seen_classes: Any = None,
        method: str = "alg",
        gamma: float | None = None,
        criterion: str | None = None,
        temperature: bool = False,
        input: str = "logit",
        *,
        classes: Any = None,
        absent_classes: Any = None,
        remaining: str = "absent",
        allow_absent_labels: bool = False,
        rate: float | None = None,
        prior: Any = None,
        head_weight: Any = None,
        head_bias: Any = None,
        group_temperature: float | None = None,
        folds: Any = None,
        held_out: Any = None,
        random_state: int = 0,
    ) -> None:
        self.seen_classes = seen_classes
        self.method = method
        self.gamma = gamma
        self.criterion = criterion
        self.temperature = temperature
        self.input = input
        self.classes = classes
        self.absent_classes = absent_classes
        self.remaining = remaining
        self.allow_absent_labels = allow_absent_labels
        self.rate = rate
        self.prior = prior
        self.head_weight = head_weight
        self.head_bias = head_bias
        self.group_temperature = group_temperature
        self.folds = folds
        self.held_out = held_out
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Choose gamma.

        Parameters
        ----------
        X
            (N, K) logits (or what ``input`` says): the fine-tuning data, or what ``method`` needs.
        y
            (N,) labels. May be None for methods that read no labels (``fixed``, ``rate``, ``pcv``, ``weight-align``)
            when ``seen_classes`` is given.

        Raises
        ------
        UserError
            Labels outside ``seen_classes`` with ``method="alg"``, labels that name no column, and the errors of
            `ft_calibrate.calibration.fit_calibration`. A `ValueError`.
        """
        z = self._scores(X, reset=True)
        if z.shape[1] < 2:
            raise UserError("two classes or more are needed", where="X", given=f"n_features = {z.shape[1]}")
        labels = self._labels(y, len(z))
        self.classes_ = column_labels(self.classes, labels, z.shape[1])
        columns = None if labels is None else label_places(labels, self.classes_, "y")
        if self.seen_classes is not None:
            seen = label_places(self.seen_classes, self.classes_, "seen_classes")
        elif columns is not None:
            seen = np.unique(columns)
        else:
            raise UserError("without labels the seen classes must be given", where="seen_classes")
        absent = (
            None if self.absent_classes is None else label_places(self.absent_classes, self.classes_, "absent_classes")
        )
        groups = class_groups(
            [str(c) for c in self.classes_], seen.tolist(), None if absent is None else absent.tolist()
        )
        held_out = self.held_out
        if held_out is not None:
            held_out = (held_out[0], label_places(held_out[1], self.classes_, "held_out"))
        self.calibration_ = fit_calibration(
            z, columns, groups, self.method,
            gamma=self.gamma, criterion=self.criterion, remaining=self.remaining,
            allow_absent_labels=self.allow_absent_labels, temperature=self.temperature, held_out=held_out,
            rate=self.rate, prior=self.prior, head_weight=self.head_weight, head_bias=self.head_bias,
            group_temperature=self.group_temperature, folds=self.folds, input=self.input, seed=self.random_state,
        )  # fmt: skip
        self.gamma_ = self.calibration_.gamma
        self.seen_, self.absent_ = self.classes_[groups.seen], self.classes_[groups.absent]
        return self

    def _scores(self, X: Any, reset: bool) -> NDArray[Any]:
        # NaN and infinities are checked with the scores: a masked class is a whole column of -inf.
        return validate_data(self, untensored(X), reset=reset, dtype=[np.float64, np.float32], ensure_all_finite=False)

    def _labels(self, y: Any, rows: int) -> NDArray[Any] | None:
        if y is None:
            if self.method not in METHODS or "labels" in METHODS[self.method].reads:
                raise UserError(f"{type(self).__name__} requires y to be passed, but the target y is None", where="y")
            return None
        return checked_labels(y, rows)

    def _calibrated(self, X: Any) -> NDArray[Any]:
        check_is_fitted(self)
        return self.calibration_.apply(self._scores(X, reset=False), kind=self.input)


class AbsentClassCalibrator(ClassifierMixin, _OnLogits):
    """Classifier on logits: argmax of the logits with gamma on the absent classes.

    Parameters
    ----------
    seen_classes
        The classes of the fine-tuning data; by default those in ``y``.
    method
        A key of `ft_calibrate.calibration.METHODS`; the paper's are ``"alg"``, ``"pcv"`` and the upper bound
        ``"oracle"``.
    gamma
        For ``method="fixed"``.
    criterion
        What the methods with labelled data maximise; None: each method's own default.
    temperature
        Also fit one temperature after the bias; it changes `predict_proba`, never `predict`.
    input : {"logit", "logprob", "prob"}
        What the features are.
    classes
        The K column labels. By default the sorted labels of ``y`` when there are K of them, else the column numbers.
    absent_classes
        By default every class that is not seen.
    remaining, allow_absent_labels, rate, prior, head_weight, head_bias, group_temperature, folds, held_out
        See `ft_calibrate.calibration.fit_calibration`.
    random_state
        Of the bootstrap and of the rows set aside for the temperature.

    Attributes
    ----------
    gamma_ : float
    classes_, seen_, absent_ : ndarray
        Class labels.
    calibration_ : Calibration
        The record; ``calibration_.write(path)`` saves it.
    n_features_in_ : int
        K.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.array([[5.0, 2.0, -1.0], [1.0, 6.0, -2.0]])
    >>> calibrator = AbsentClassCalibrator().fit(z, [0, 1])
    >>> calibrator.gamma_, calibrator.predict([[1.0, 0.0, -1.0]]).tolist()
    (3.0, [2])
    """

    def decision_function(self, X: Any) -> Any:
        """Calibrated logits (N, K); with two classes, as scikit-learn has it, their difference (N,)."""
        z = self._calibrated(X)
        return like(z[:, 1] - z[:, 0] if z.shape[1] == 2 else z, X)

    def predict(self, X: Any) -> Any:
        """Class labels (N,); a tensor for tensors when the labels are numbers. The first of equal scores wins."""
        columns = self._calibrated(X).argmax(axis=1)
        labels = self.classes_[columns]
        return like(labels, X) if labels.dtype.kind in "iuf" else labels

    def predict_proba(self, X: Any) -> Any:
        """Softmax (N, K) of the calibrated logits over the temperature."""
        check_is_fitted(self)
        return like(self.calibration_.probabilities(self._scores(X, reset=False), kind=self.input), X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # its features are logits already, not data to learn from
        return tags


class AbsentClassBias(TransformerMixin, _OnLogits):
    """Transformer of logits: adds gamma to the absent classes. Parameters and attributes as `AbsentClassCalibrator`.

    Examples
    --------
    >>> AbsentClassBias(seen_classes=[0], method="fixed", gamma=2.0).fit_transform([[1.0, 0.0]], [0]).tolist()
    [[1.0, 2.0]]
    """

    def transform(self, X: Any) -> Any:
        """Calibrated logits (N, K), in the precision of ``X``; probabilities come out as calibrated logs."""
        return like(self._calibrated(X), X)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """The K class labels as strings."""
        check_is_fitted(self)
        return np.asarray([str(c) for c in self.classes_], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = "labels" in METHODS[self.method].reads if self.method in METHODS else True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class AbsentClassClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Any classifier on raw features, with gamma on the scores of the classes that its last data lacked.

    A classifier that is fitted on all classes of Y and then updated on S only (``partial_fit``, ``warm_start``) is
    wrapped as ``AbsentClassClassifier(FrozenEstimator(classifier))``; `fit` then only chooses gamma. An unfitted
    classifier is fitted on the data of `fit` first.

    Parameters
    ----------
    estimator
        With ``decision_function`` (one score per class) or ``predict_proba`` (its logs are taken, floor 1e-30).
    seen_classes, method, gamma, criterion, temperature, absent_classes, remaining, allow_absent_labels, rate, prior
        As in `AbsentClassCalibrator`. For ``"weight-align"`` the weights are the estimator's ``coef_``.
    random_state
        As there.

    Attributes
    ----------
    estimator_
        The fitted classifier.
    gamma_, classes_, seen_, absent_, calibration_
        As in `AbsentClassCalibrator`.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> model = AbsentClassClassifier(LogisticRegression()).fit([[0.0], [1.0], [2.0]], ["a", "b", "c"])
    >>> model.gamma_, model.absent_.tolist()
    (0.0, [])
    """

    def __init__(
        self,
        estimator: Any,
        seen_classes: Any = None,
        method: str = "alg",
        gamma: float | None = None,
        criterion: str | None = None,
        temperature: bool = False,
        *,
        absent_classes: Any = None,
        remaining: str = "absent",
        allow_absent_labels: bool = False,
        rate: float | None = None,
        prior: Any = None,
        random_state: int = 0,
    ) -> None:
        self.estimator = estimator
        self.seen_classes = seen_classes
        self.method = method
        self.gamma = gamma
        self.criterion = criterion
        self.temperature = temperature
        self.absent_classes = absent_classes
        self.remaining = remaining
        self.allow_absent_labels = allow_absent_labels
        self.rate = rate
        self.prior = prior
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the classifier (unless it is frozen) and choose gamma on its scores of the same data.

        Parameters
        ----------
        X
            (N, D) features.
        y
            (N,) labels, all of seen classes for ``method="alg"``.

        Raises
        ------
        UserError
            As in `AbsentClassCalibrator`; scores that are not one per class. A `ValueError`.
        """
        if y is None:
            raise UserError(f"{type(self).__name__} requires y to be passed, but the target y is None", where="y")
        self.estimator_ = clone(self.estimator).fit(X, y)
        self.classes_ = self.estimator_.classes_
        if len(self.classes_) < 2:
            raise UserError("two classes or more are needed", where="y", given="1 class")
        z = self._scores(X)
        labels = checked_labels(y, len(z))
        method = self.method
        head: dict[str, Any] = {}
        if method == "weight-align" and hasattr(self.estimator_, "coef_"):
            head = {"head_weight": self.estimator_.coef_, "head_bias": self.estimator_.intercept_}
        self._gamma = AbsentClassBias(
            self.seen_classes, method, self.gamma, self.criterion, self.temperature, classes=self.classes_,
            absent_classes=self.absent_classes, remaining=self.remaining, rate=self.rate, prior=self.prior,
            allow_absent_labels=self.allow_absent_labels, random_state=self.random_state, **head,
        ).fit(z, labels)  # fmt: skip
        self.calibration_: Calibration = self._gamma.calibration_
        self.gamma_, self.seen_, self.absent_ = self._gamma.gamma_, self._gamma.seen_, self._gamma.absent_
        return self

    def _scores(self, X: Any) -> NDArray[Any]:
        """One score per class, (N, K)."""
        k = len(self.classes_)
        if hasattr(self.estimator_, "decision_function"):
            z = np.asarray(self.estimator_.decision_function(X), dtype=np.float64)
            if z.ndim == 1:  # the log-odds of the second class
                z = np.stack([np.zeros_like(z), z], axis=1)
        else:
            z = np.log(np.maximum(self.estimator_.predict_proba(X), PROBABILITY_FLOOR))
        if z.shape[1] != k:
            remedy = "use decision_function_shape='ovr', or an estimator with predict_proba"
            raise UserError("the estimator needs one score per class", given=f"{z.shape[1]} for {k}", remedy=remedy)
        return z

    def _calibrated(self, X: Any) -> NDArray[Any]:
        check_is_fitted(self)
        return self.calibration_.apply(self._scores(X), kind="logit")

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Calibrated scores (N, K); with two classes their difference (N,)."""
        z = self._calibrated(X)
        return z[:, 1] - z[:, 0] if z.shape[1] == 2 else z

    def predict(self, X: Any) -> NDArray[Any]:
        """Class labels (N,)."""
        columns = self._calibrated(X).argmax(axis=1)
        return self.classes_[columns]

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Softmax (N, K) of the calibrated scores over the temperature."""
        check_is_fitted(self)
        return self.calibration_.probabilities(self._scores(X), kind="logit")

    @property
    def n_features_in_(self) -> int:
        """Number of features, as the fitted classifier has it."""
        try:
            check_is_fitted(self)
        except Exception as error:
            raise AttributeError(f"{type(self).__name__} is not fitted: no n_features_in_") from error
        return self.estimator_.n_features_in_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.input_tags.sparse = inner.input_tags.sparse
        tags.input_tags.allow_nan = inner.input_tags.allow_nan
        tags.classifier_tags.multi_class = inner.classifier_tags.multi_class
        return tags
