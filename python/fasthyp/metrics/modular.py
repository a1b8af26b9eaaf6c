"""The metrics as objects that see a data set batch by batch (torchmetrics)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fasthyp._tensors import check_floating
from fasthyp.metrics import hypotheses as over
from fasthyp.metrics import pose as single
from fasthyp.metrics import uncertainty as judged
from fasthyp.metrics._checks import check_thresholds
from fasthyp.metrics.procrustes import aligned_distances, pa_mpjpe

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        f"the classes of fasthyp.metrics need torchmetrics: pip install 'fasthyp[metrics]' "
        f"({error}); its functions do not"
    ) from error

Over = Literal["best", "mean", "median", "worst"]
_OVER = ("best", "mean", "median", "worst")


class _PoseMetric(Metric):
    """Mean over poses of a number per pose.

    ``update(pred, truth, mask=None)`` takes predictions (..., J, D) and truths that broadcast with
    them; with ``over`` hypotheses (B, M, J, D), truths (B, J, D) and masks (B, J). A pose without a
    joint that counts is left out. ``compute()`` is a float64 scalar, NaN where there was no pose.
    Sums are kept in float64 and added over processes.

    Args:
        over: which number of each image's hypotheses counts: ``"best"``, ``"mean"``, ``"median"``
            (the lower middle) or ``"worst"``. Of scores the best is the greatest, of errors the
            least. None: every prediction counts by itself.
        options: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is none of those.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, over: Over | None = None, **options: Any) -> None:
        super().__init__(**options)
        if over not in (None, *_OVER):
            raise ValueError(f"over: expected one of {', '.join(_OVER)} or None, got {over!r}")
        self.over = over
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    @abstractmethod
    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        """The numbers, (...)."""

    def update(self, pred: Tensor, truth: Tensor, mask: Tensor | None = None) -> None:
        """Add predictions; the arguments and errors of the function of the same name."""
        if self.over is not None:
            check_floating("pred", pred), check_floating("truth", truth)
            if pred.ndim != 4 or truth.ndim != 3 or len(pred) != len(truth):
                raise ValueError(
                    f"pred, truth: expected (B, M, J, D) and (B, J, D) with over={self.over!r}, "
                    f"got {tuple(pred.shape)} and {tuple(truth.shape)}"
                )
            truth = truth[:, None]
            mask = mask[:, None] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
        with torch.no_grad():
            values = self._values(pred.detach(), truth.detach(), mask)
            counted = torch.ones_like(values, dtype=torch.bool)
            if mask is not None:
                counted = mask.any(-1).expand(values.shape)
            if self.over is not None and len(values):
                statistics = over.over_hypotheses(values)
                name = self.over
                if self.higher_is_better:
                    name = {"best": "worst", "worst": "best"}.get(name, name)  # type: ignore[assignment]
                values, counted = getattr(statistics, name), counted[:, 0]
            self.total += torch.where(counted, values, 0.0).sum(dtype=torch.float64)
            self.count += counted.sum()

    def compute(self) -> Tensor:
        """The mean, () float64."""
        return self.total / self.count


class MPJPE(_PoseMetric):
    """Mean of :func:`mpjpe` over poses, in their unit.

    Args:
        over: see above.
        root: of :func:`mpjpe`.
    """

    def __init__(
        self, over: Over | None = None, root: int | Sequence[int] | None = None, **options: Any
    ) -> None:
        super().__init__(over, **options)
        self.root = root

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        return single.mpjpe(pred, truth, mask, self.root)


class NMPJPE(MPJPE):
    """Mean of :func:`n_mpjpe` over poses, in their unit."""

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        return single.n_mpjpe(pred, truth, mask, self.root)


class PAMPJPE(_PoseMetric):
    """Mean of :func:`pa_mpjpe` over poses, in their unit."""

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        return pa_mpjpe(pred, truth, mask)


class PVE(_PoseMetric):
    """Mean of :func:`pve` over meshes, in their unit."""

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        return single.pve(pred, truth, mask)


class PCK(_PoseMetric):
    """Mean of :func:`pck` over poses, 0 to 1.

    Args:
        over: see above.
        threshold, root: of :func:`pck`.
    """

    higher_is_better = True

    def __init__(
        self,
        over: Over | None = None,
        threshold: float = 150.0,
        root: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(over, **options)
        self.threshold, self.root = threshold, root

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        return single.pck(pred, truth, self.threshold, mask, self.root)


class AUC(_PoseMetric):
    """Mean of :func:`auc` over poses, 0 to 1.

    Args:
        over: see above.
        thresholds, root: of :func:`auc`.
    """

    higher_is_better = True

    def __init__(
        self,
        over: Over | None = None,
        thresholds: Sequence[float] = single.AUC_THRESHOLDS,
        root: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(over, **options)
        self.thresholds, self.root = thresholds, root
        check_thresholds(thresholds, torch.device("cpu"))

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        return single.auc(pred, truth, self.thresholds, mask, self.root)


class CPS(_PoseMetric):
    """Mean of :func:`cps` over poses, in their unit.

    Args:
        over: see above.
        thresholds: of :func:`cps`.
        align: bring the prediction closest to the truth first, by :func:`procrustes`, as Wehrbein
            et al., ICCV 2021, do.
    """

    higher_is_better = True

    def __init__(
        self,
        over: Over | None = None,
        thresholds: Sequence[float] = single.CPS_THRESHOLDS,
        align: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(over, **options)
        self.thresholds, self.align = thresholds, align
        check_thresholds(thresholds, torch.device("cpu"), least=2)

    def _values(self, pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
        if not self.align:
            return single.cps(pred, truth, self.thresholds, mask)
        worst = single.worst_of(aligned_distances(pred, truth, mask), mask)
        return single.cps_of_worst(worst, self.thresholds)


class Diversity(Metric):
    """Mean over images of :func:`diversity`: ``update(hypotheses)`` with (B, M, J, D),
    ``compute()`` (J, D) float64 in their unit, NaN where there was no image.

    Args:
        num_joints: J.
        dims: D.
        correction: of :func:`diversity`.
        options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_joints: int, dims: int = 3, correction: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.correction = correction
        self.add_state(
            "total", torch.zeros(num_joints, dims, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, hypotheses: Tensor) -> None:
        """Add images.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        over.check_hypotheses(hypotheses)
        if hypotheses.shape[-2:] != self.total.shape:
            expected = tuple(self.total.shape)
            raise ValueError(f"hypotheses: expected {expected}, got {tuple(hypotheses.shape)}")
        spread = over.diversity(hypotheses.detach(), self.correction).flatten(0, -3)
        self.total += spread.sum(0, dtype=torch.float64)
        self.count += len(spread)

    def compute(self) -> Tensor:
        """(J, D) float64."""
        return self.total / self.count


class Sharpness(Metric):
    """Mean over joints and images of :func:`sharpness`: ``update(hypotheses)`` with (B, M, J, D),
    ``compute()`` a float64 scalar in their unit, NaN where there was no image.

    Args:
        options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def update(self, hypotheses: Tensor) -> None:
        """Add images.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        spread = over.sharpness(hypotheses.detach())
        self.total += spread.sum(dtype=torch.float64)
        self.count += spread.numel()

    def compute(self) -> Tensor:
        """() float64."""
        return self.total / self.count


class Calibration(Metric):
    """:func:`calibration_curve` of all joints of all images: ``update(hypotheses, truth)`` with
    (B, M, J, D) and (B, J, D), ``compute()`` coverage (L,) float64 and calibration error.

    Args:
        levels: of :func:`calibration_curve`.
        options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    levels: Tensor
    inside: Tensor
    count: Tensor

    def __init__(self, levels: Sequence[float] = judged.CALIBRATION_LEVELS, **options: Any) -> None:
        super().__init__(**options)
        limits = judged.check_levels(levels, torch.device("cpu"))
        self.register_buffer("levels", limits, persistent=False)
        self.add_state("inside", torch.zeros(len(limits), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, hypotheses: Tensor, truth: Tensor) -> None:
        """Add images; errors as of :func:`confidence_rank`."""
        ranks = judged.confidence_rank(hypotheses, truth)
        inside, count = judged.count_inside(ranks, self.levels)
        self.inside += inside
        self.count += count

    def compute(self) -> tuple[Tensor, Tensor]:
        """Coverage (L,) and calibration error (), float64."""
        coverage = self.inside.double() / self.count
        return coverage, (coverage - self.levels).abs().mean()


class Pearson(Metric):
    """:func:`pearson` of everything seen: ``update(uncertainty, error)`` of any equal shapes,
    ``compute()`` a float64 scalar.

    Kept as float64 sums, which costs digits where the spread is a small share s of the mean: about
    1e-16 / s^2.

    Args:
        options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    sums: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        inf = torch.full((2,), torch.inf, dtype=torch.float64)
        self.add_state("least", inf, dist_reduce_fx="min")
        self.add_state("greatest", -inf, dist_reduce_fx="max")

    def update(self, uncertainty: Tensor, error: Tensor) -> None:
        """Add predictions; errors as of :func:`pearson`."""
        x, y = judged._flat_pair(uncertainty, error)
        if not len(x):
            return
        both = torch.stack([x, y])
        products = torch.stack([x, y, x * x, y * y, x * y]).sum(1)
        self.sums += torch.cat([products.new_full((1,), len(x)), products])
        self.least = torch.minimum(self.least, both.amin(1))
        self.greatest = torch.maximum(self.greatest, both.amax(1))

    def compute(self) -> Tensor:
        """() float64; NaN where one of them is constant."""
        n, x, y, xx, yy, xy = self.sums.unbind()
        scale = ((xx - x * x / n).clamp_min(0) * (yy - y * y / n).clamp_min(0)).sqrt()
        varies = (self.greatest > self.least).all()
        return ((xy - x * y / n) / scale.where(varies, torch.nan)).clamp(-1, 1)


class SparsificationCurve(Metric):
    """:func:`sparsification` of everything seen: ``update(uncertainty, error)`` of any equal
    shapes, ``compute()`` a :class:`Sparsification`.

    Keeps all numbers, 16 bytes a prediction: the curve sorts them.

    Args:
        steps: of :func:`sparsification`.
        options: of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    uncertainty: list[Tensor]
    error: list[Tensor]

    def __init__(self, steps: int = 100, **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps
        self.add_state("uncertainty", [], dist_reduce_fx="cat")
        self.add_state("error", [], dist_reduce_fx="cat")

    def update(self, uncertainty: Tensor, error: Tensor) -> None:
        """Add predictions; errors as of :func:`sparsification`."""
        x, y = judged._flat_pair(uncertainty, error)
        self.uncertainty.append(x.clone())
        self.error.append(y.clone())

    def compute(self) -> judged.Sparsification:
        """Raises ValueError where nothing was seen."""
        x, y = (
            # one tensor after the processes were gathered
            values if isinstance(values, Tensor) else torch.cat([torch.empty(0).double(), *values])
            for values in (self.uncertainty, self.error)
        )
        return judged.sparsification(x, y, self.steps)
