"""Best-of-M: a loss on the k hypotheses that are nearest to the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_choice, mean


def best_hypotheses(
    hypotheses: Tensor,
    target: Tensor,
    k: int = 1,
    *,
    root: Sequence[int] | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The k hypotheses of each image with the lowest mean per-joint position error.

    Computed for ``chunk`` hypotheses at a time, without a graph: in memory of chunk, not M, poses.

    Args:
        hypotheses: (B, M, J, C) float32 or float64, any strides.
        target: (B, J, C).
        k: 1 to M.
        root: joints whose mean is the origin of each pose; the poses as they are, unless told.
        chunk: hypotheses at a time.

    Returns:
        errors (B, k), in the unit of the poses, the smallest first; indices (B, k), int64. NaN is
        larger than any number.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check(hypotheses, target, k, root, chunk)
    with torch.no_grad():
        target = _centred(target, root)[:, None]
        errors = torch.cat(
            [
                (_centred(part, root) - target).norm(dim=-1).mean(-1)
                for part in hypotheses.split(chunk, dim=1)
            ],
            dim=1,
        )
        best = errors.topk(k, dim=1, largest=False)
    return best.values, best.indices


def best_of_m_loss(
    hypotheses: Tensor,
    target: Tensor,
    *,
    k: int = 1,
    norm: str = "l1",
    root: Sequence[int] | None = None,
    chunk: int = 64,
    official: bool = False,
) -> Tensor:
    """The distance of the truth from the mean of the k best of M hypotheses.

    L_MB, equation 8 of Wehrbein et al., ICCV 2021 (``norm="l1"``, k = 5, weight 4), L_BoM, equation
    12 of ProPose, AAAI 2025 (``norm="l2"``); k = 1 is Guzman-Rivera et al.'s best-of-M. Hypotheses
    are ranked by :func:`best_hypotheses`, and only the k best of each image get a gradient. Where
    hypotheses are made by a network, :func:`best_of_m_loss_streamed` never holds all of them.

    Args:
        hypotheses, target, k, root, chunk: as for :func:`best_hypotheses`.
        norm: ``"l1"``: the mean over images, joints and coordinates of the absolute differences, as
            the weight of Wehrbein et al. is for (they write the sum). ``"l2"``: the sum over joints
            of their distances, averaged over images.
        official: as the code of Wehrbein et al., which puts the root back into the pose and so
            divides by J + 1 joints in ``"l1"``; needs ``root``.

    Returns:
        A number.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_options(norm, root, official)
    _, indices = best_hypotheses(hypotheses, target, k, root=root, chunk=chunk)
    rows = torch.arange(len(hypotheses), device=hypotheses.device)[:, None]
    return _loss(hypotheses[rows, indices], target, norm, root, official)


def best_of_m_loss_streamed(
    generate: Callable[[Tensor], Tensor],
    latents: Tensor,
    target: Tensor,
    *,
    k: int = 1,
    norm: str = "l1",
    root: Sequence[int] | None = None,
    chunk: int = 64,
    official: bool = False,
) -> Tensor:
    """:func:`best_of_m_loss` of hypotheses that are made from latents and never held together.

    ``chunk`` latents an image at a time are turned into hypotheses without a graph and ranked; then
    the k best are made once more, with one. Exact, as all others have a zero gradient, in memory of
    chunk hypotheses and the graph of k, and without M backward passes. ``generate`` must be a
    function of its argument alone: no dropout, batch norm only in eval mode.

    Args:
        generate: latents (B, n, D) -> hypotheses (B, n, J, C), row by row.
        latents: (B, M, D).
        target: (B, J, C).
        k, norm, root, chunk, official: as for :func:`best_of_m_loss`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not callable(generate):
        raise TypeError(f"generate: expected a function, got {type(generate).__name__}")
    _check_options(norm, root, official)
    shapes = Shapes()
    shapes("latents", latents, "B M D")
    shapes("target", target, "B J C")
    _check_count("k", k, shapes["M"])
    _check_count("chunk", chunk, 2**31)
    errors = []
    with torch.no_grad():
        for part in latents.split(chunk, dim=1):
            made = generate(part)
            Shapes()("generate", made, f"{len(part)} {part.shape[1]} J C")
            error, index = best_hypotheses(made, target, made.shape[1], root=root, chunk=chunk)
            errors.append(torch.empty_like(error).scatter_(1, index, error))
        indices = torch.cat(errors, dim=1).topk(k, dim=1, largest=False).indices
    rows = torch.arange(len(latents), device=latents.device)[:, None]
    return _loss(generate(latents[rows, indices]), target, norm, root, official)


class BestOfMLoss(LossModule, function=best_of_m_loss):
    """Module of :func:`best_of_m_loss`."""


class StreamedBestOfMLoss(LossModule, function=best_of_m_loss_streamed):
    """Module of :func:`best_of_m_loss_streamed`."""


def _loss(
    best: Tensor, target: Tensor, norm: str, root: Sequence[int] | None, official: bool
) -> Tensor:
    difference = _centred(best, root).mean(1) - _centred(target, root)
    if norm == "l2":
        return mean(difference.norm(dim=-1).sum(-1))
    joints = difference.shape[1]
    return mean(difference.abs()) * (joints / (joints + 1) if official else 1)


def _centred(poses: Tensor, root: Sequence[int] | None) -> Tensor:
    if root is None:
        return poses
    return poses - poses[..., list(root), :].mean(-2, keepdim=True)


def _check_options(norm: str, root: Sequence[int] | None, official: bool) -> None:
    check_choice("norm", norm, ("l1", "l2"))
    if official and (root is None or norm != "l1"):
        raise ValueError(f"official: expected norm='l1' and a root, got {norm!r} and {root}")


def _check(
    hypotheses: Tensor, target: Tensor, k: int, root: Sequence[int] | None, chunk: int
) -> None:
    shapes = Shapes()
    shapes("hypotheses", hypotheses, "B M J C")
    shapes("target", target, "B J C")
    _check_count("k", k, shapes["M"])
    _check_count("chunk", chunk, 2**31)
    if root is not None and (
        not root or any(not isinstance(j, int) or not 0 <= j < shapes["J"] for j in root)
    ):
        raise ValueError(f"root: expected joints from 0 to {shapes['J'] - 1}, got {root}")


def _check_count(name: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")
    if not 1 <= value <= most:
        raise ValueError(f"{name}: expected 1 to {most}, got {value}")
