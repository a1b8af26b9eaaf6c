"""From a detector's heatmaps to hypotheses of 3D poses, all on one device.

estimator = PoseEstimator(LiftingFlow.from_pretrained().cuda())
estimate = estimator(heatmaps, seed=0)   # (P, 17, 64, 64) on the same device
estimate.hypotheses                      # (P, 1000, 13, 3) mm
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthyp._graphs import GraphCache, Noise
from fasthyp._seed import check_int, resolve_seed
from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.program import stamp
from fasthyp.heatmaps import GaussianFit, fit_gaussians
from fasthyp.models.lifting import LiftingFlow
from fasthyp.observations import COCO17, GRID, JOINTS, Gaussians
from fasthyp.skeleton import COCO17_TO_COCO13

# What stands in for a joint whose heatmap could not be fitted: about the faintest and widest blob
# that the model knows, in cells of a 64 x 64 map.
_UNSEEN_AMPLITUDE, _UNSEEN_STD = 0.13, 10.0


class PoseEstimate(NamedTuple):
    """Distribution of the 3D poses of P persons, M hypotheses of each.

    Poses are in millimetres, mid-hip centred, in camera axes: x right, y down, z away from the
    camera. Joints in the order of :data:`fasthyp.skeleton.COCO13_JOINTS`. All numbers of a person
    none of whose heatmaps could be fitted are NaN, except ``fit``.

    Attributes:
        hypotheses: (P, M, 13, 3) mm.
        log_prob: (P, M) log-density of each, nats, over the 39 coordinates in metres.
        mode: (P, 13, 3) mm, the hypothesis of z = 0.
        mean: (P, 13, 3) mm of the hypotheses.
        std: (P, 13) mm, root-mean-square distance of the hypotheses from their mean:
            ``sqrt(trace(covariance))``.
        covariance: (P, 13, 3, 3) mm^2 of the hypotheses about their mean (sum / M).
        observed: (P, 13) whether the joint's heatmap could be fitted. One that could not be enters
            as a wide blob about the other joints.
        fit: of the heatmaps, in cells.
    """

    hypotheses: Tensor
    log_prob: Tensor
    mode: Tensor
    mean: Tensor
    std: Tensor
    covariance: Tensor
    observed: Tensor
    fit: GaussianFit


class PoseEstimator:
    """Gaussian fits, condition, hypotheses and their statistics in one call, on the model's device.

    Nothing waits for the device, and on CUDA calls of one shape are captured in a CUDA graph: one
    replay then does everything. The stages can also be called one by one.

    Args:
        model: is used as it is at each call; changed weights are noticed.
        num_samples: M, hypotheses per person.
        precision: of the flow: ``"highest"``, ``"high"`` or ``"medium"``.
        graph: ``"auto"`` captures at the second call of a shape, ``True`` at the first, ``False``
            never.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: LiftingFlow,
        num_samples: int = 1000,
        precision: str = "high",
        graph: bool | str = "auto",
    ) -> None:
        if not isinstance(model, LiftingFlow):
            raise TypeError(f"model: expected a LiftingFlow, got {type(model).__name__}")
        check_int("num_samples", num_samples, 1, 2**32 - 1)
        self.model = model
        self.num_samples = num_samples
        self.precision = precision
        self._graphs = GraphCache(graph)
        self._executor = FlowExecutor(model.program, precision)

    def __call__(
        self, heatmaps: Tensor, seed: int | None = None, *, image_offset: int = 0
    ) -> PoseEstimate:
        """Hypotheses of the poses behind heatmaps.

        Args:
            heatmaps: (P, 17, H, W) COCO joints, or (P, 13, H, W) those of
                :data:`fasthyp.skeleton.COCO13_JOINTS`; floating point, on the model's device.
            seed: 0 <= seed < 2**64; hypothesis m of person p depends on the seed, p and m alone.
                None draws one from PyTorch's default generator.
            image_offset: number of the first person, where these are part of a longer list.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; or
                ``graph=True`` where a call cannot be captured.
        """
        _check_heatmaps(heatmaps, self.model.centre.device)
        check_int("image_offset", image_offset, 0, 2**32 - len(heatmaps))
        with torch.no_grad():
            results = self._graphs(
                *(self._run, [heatmaps.detach()], Noise(resolve_seed(seed, None), image_offset)),
                *(heatmaps.device, self.num_samples, self._version),
            )
        poses, log_prob, mode, mean, std, covariance, observed, *fit = results
        return PoseEstimate(
            *(poses, log_prob, mode, mean, std, covariance, observed), GaussianFit(*fit)
        )

    def _run(self, heatmaps: Tensor, noise: Noise) -> tuple[Tensor, ...]:
        fit = self.fit(heatmaps)
        gaussians = Gaussians(fit.amplitude, fit.mean, fit.covariance)
        observed = is_fitted(fit)
        cond = self.condition(gaussians, observed, (heatmaps.shape[2], heatmaps.shape[3]))
        return *self.sample(cond, noise), observed, *fit

    def _version(self) -> Any:
        model = self.model
        others = stamp([model.feature_mean, model.feature_std, *model.condition_net.parameters()])
        if others is None:
            return "parameters made in inference mode do not tell when they change"
        whole = self._executor.whole(self._executor.current_plan(), [model.centre])
        return whole if isinstance(whole, str) else (whole, others)

    # --- stages -----------------------------------------------------------------------------------

    def fit(self, heatmaps: Tensor) -> GaussianFit:
        """Gaussians of the 13 body joints of heatmaps (P, 17 or 13, H, W)."""
        if heatmaps.shape[1] == COCO17:
            heatmaps = torch.stack([heatmaps[:, joint] for joint in COCO17_TO_COCO13], 1)
        return fit_gaussians(heatmaps)

    def condition(self, gaussians: Gaussians, observed: Tensor, size: tuple[int, int]) -> Tensor:
        """Condition (P, cond_dim) of Gaussians on a map of ``size`` (H, W), of which those not
        ``observed`` (P, 13) are replaced; NaN for a person of whom none is."""
        return condition_of(self.model, gaussians, observed, size)

    def sample(self, cond: Tensor, noise: Noise) -> tuple[Tensor, ...]:
        """First six fields of :class:`PoseEstimate`; NaN where ``cond`` (P, C) is not finite.

        They are what :meth:`LiftingFlow.sample` draws with ``include_mode``: its hypothesis 0 is
        the mode, 1 to M are those of the estimate.
        """
        x, log_prob = self._executor.sample(
            *(cond, self.num_samples + 1, noise.seed, noise.image_offset),
            include_mode=True,
            counter=noise.counter,
        )
        lost = ~_all_finite(cond)[:, None]  # a ReLU in the flow may have lost the NaN
        poses = x.masked_fill_(lost[..., None], torch.nan).mul_(1000).unflatten(-1, (JOINTS, 3))
        log_prob = log_prob[:, 1:].masked_fill(lost, torch.nan)
        mode, poses = poses[:, 0].contiguous(), poses[:, 1:].contiguous()
        mean = poses.mean(1)
        centred = poses - mean[:, None]
        # Not a matrix product: its rounding would be the caller's setting of tf32.
        covariance = (centred[..., :, None] * centred[..., None, :]).mean(1)
        std = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        return poses, log_prob, mode, mean, std, covariance


def condition_of(
    model: LiftingFlow, gaussians: Gaussians, observed: Tensor, size: tuple[int, int]
) -> Tensor:
    """:meth:`PoseEstimator.condition` of a model."""
    filled = fill_unseen(gaussians, observed, size)
    # A matrix product of another size may round otherwise. One person at a time makes the
    # hypotheses independent of the batch, to the last bit; on CUDA it would cost too much.
    rows = 1 if model.centre.device.type == "cpu" else len(observed)
    parts = (values.to(model.centre.dtype).split(rows) for values in filled)
    cond = torch.cat([model.condition(a, m, c, size) for a, m, c in zip(*parts, strict=True)])
    return cond.masked_fill(~observed.any(1, keepdim=True), torch.nan)


def is_fitted(fit: GaussianFit) -> Tensor:
    """(P, 13): the joint has a Gaussian."""
    numbers = [fit.amplitude[..., None], fit.mean, fit.covariance.flatten(-2)]
    return fit.converged & _all_finite(torch.cat(numbers, -1))


def _all_finite(values: Tensor) -> Tensor:
    """Of the last dimension; in fewer launches than ``isfinite``."""
    return (values * 0).sum(-1) == 0


def fill_unseen(gaussians: Gaussians, observed: Tensor, size: tuple[int, int]) -> Gaussians:
    """Wide blobs about the mean of the observed joints in place of the others."""
    unseen = ~observed
    mean = gaussians.mean.masked_fill(unseen[..., None], 0.0)
    centre = mean.sum(1, keepdim=True) / observed.sum(1).clamp_min(1)[:, None, None]
    std = _UNSEEN_STD * max(size) / GRID
    wide = std**2 * torch.eye(2, dtype=mean.dtype, device=mean.device)
    return Gaussians(
        gaussians.amplitude.masked_fill(unseen, _UNSEEN_AMPLITUDE),
        torch.where(unseen[..., None], centre, mean),
        torch.where(unseen[..., None, None], wide, gaussians.covariance),
    )


def _check_heatmaps(heatmaps: Tensor, device: torch.device) -> None:
    if not isinstance(heatmaps, Tensor) or not heatmaps.is_floating_point():
        got = heatmaps.dtype if isinstance(heatmaps, Tensor) else type(heatmaps).__name__
        raise TypeError(f"heatmaps: expected a tensor of a floating dtype, got {got}")
    shape = tuple(heatmaps.shape)
    if len(shape) != 4 or shape[1] not in (JOINTS, COCO17) or 0 in shape:
        expected = f"(P, {JOINTS}, H, W) or (P, {COCO17}, H, W) with P >= 1"
        raise ValueError(f"heatmaps: expected shape {expected}, got {shape}")
    if heatmaps.device != device:
        raise ValueError(f"heatmaps: expected on {device}, as the model, got {heatmaps.device}")
