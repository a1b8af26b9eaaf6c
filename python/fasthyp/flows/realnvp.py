"""RealNVP of POCO (Dwivedi et al., "POCO: 3D Pose and Shape Estimation with Confidence", 3DV 2024):
described, and fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.flows.fused import FusedFlow, adopted
from fasthyp.flows.parts import require_plain, subnet
from fasthyp.flows.program import (
    AffineKind,
    Coupling,
    FlowProgram,
    Opaque,
    UnsupportedFlow,
    Watch,
)

NetMaker = Callable[[int, int, int], nn.Module]

_ARGUMENTS = {"forward_p": ("self", "z", "x_cond"), "backward_p": ("self", "x", "x_cond")}


def knows(module: object) -> bool:
    """Whether :func:`describe` is the one for this module: this package's ``RealNVP``, or POCO's,
    which is known by its name, its parts and the arguments of its methods."""
    return isinstance(module, FusedRealNVP) or _is_pocos(module)


def _is_pocos(module: object) -> bool:
    if not isinstance(module, nn.Module) or not any(
        cls.__name__ == "RealNVP" for cls in type(module).__mro__
    ):
        return False
    parts = {"s": nn.ModuleList, "t": nn.ModuleList, "mask": Tensor, "prior": object}
    if not all(isinstance(getattr(module, name, None), kind) for name, kind in parts.items()):
        return False
    return all(
        name not in vars(module)
        and getattr(getattr(type(module), name, None), "__qualname__", "") == f"RealNVP.{name}"
        and getattr(type(module), name).__code__.co_varnames[:3] == arguments
        for name, arguments in _ARGUMENTS.items()
    )


def describe(module: Any) -> FlowProgram:
    """The program of a RealNVP with a standard normal prior.

    Raises:
        UnsupportedFlow: another prior, masks of other numbers than 0 and 1, hooks, or subnets that
            do not show the width of the condition.
    """
    prior = module.prior
    loc = getattr(prior, "loc", None)
    scale = getattr(prior, "scale_tril", None)
    if loc is None or scale is None or loc.any() or not scale.equal(torch.eye(len(loc)).to(scale)):
        raise UnsupportedFlow("its prior is not a standard normal")
    return program(module)


def program(module: Any) -> FlowProgram:
    """The program of a RealNVP: its steps lead from the latent to the data, as ``forward_p``."""
    require_plain(module, "it")
    watch = Watch()
    for part in (module, module.s, module.t):
        watch.module(part)
    mask = module.mask
    watch.values(mask)
    if mask.dim() != 2 or not ((mask == 0) | (mask == 1)).all():
        raise UnsupportedFlow("its masks are not rows of zeros and ones")
    if not len(mask) == len(module.s) == len(module.t):
        raise UnsupportedFlow(f"it has {len(mask)} masks, {len(module.s)} and {len(module.t)} nets")
    dim = mask.shape[1]
    width = _cond_width(module.s, dim)
    steps = [
        _coupling(row, module.s[i], module.t[i], width, f"s.{i}", watch)
        for i, row in enumerate(mask.tolist())
    ]
    return FlowProgram(dim, (width,) if width else (), steps, watch, inverted=True)


def _cond_width(nets: nn.ModuleList, dim: int) -> int:
    linear = next((part for part in nets.modules() if isinstance(part, nn.Linear)), None)
    if linear is None or linear.in_features < dim:
        raise UnsupportedFlow("its subnets do not begin with a Linear of the data")
    return linear.in_features - dim


def _coupling(
    mask: list[float], s: nn.Module, t: nn.Module, width: int, name: str, watch: Watch
) -> Coupling:
    """The subnets see all dims, with zeros for those that change, and say something of all."""
    active = tuple(i for i, passed in enumerate(mask) if not passed)
    passive = tuple(i for i, passed in enumerate(mask) if passed)
    dim, clamp = len(mask), "tanh"
    scale = subnet(s, watch, ending="tanh")
    if isinstance(scale, Opaque):
        scale, clamp = subnet(s, watch), "none"
    nets = [
        net
        if not isinstance(net, Opaque)
        else Opaque(net.module, net.reason, partial(_masked, net.module, active, passive))
        for net in (scale, subnet(t, watch))
    ]
    return Coupling(
        *(active, passive, nets[0], AffineKind(1.0, clamp), tuple(range(width)), name),
        shift_subnet=nets[1],
        inputs=(*passive, *range(dim, dim + width)),
        outputs=active,
    )


def _masked(
    net: nn.Module, active: tuple[int, ...], passive: tuple[int, ...], rows: Tensor
) -> Tensor:
    """Rows [passive, cond] through a subnet of all dims -> what it says of the active ones."""
    full = rows.new_zeros(len(rows), len(active) + len(passive))
    full = full.index_copy(1, torch.tensor(passive, device=rows.device), rows[:, : len(passive)])
    return net(torch.cat([full, rows[:, len(passive) :]], 1))[:, list(active)]


def realnvp_masks(kind: str, dim: int, layers: int) -> Tensor:
    """The masks of POCO's flow head, (2 * layers, dim); 1 for dims that are passed on.

    They are POCO's as they are: ``"alter"`` gives the same mask twice for an even ``dim``, of
    which half is then never changed, ``"new"`` never changes the middle one of an odd ``dim``, and
    ``"old"`` changes it every time.

    Args:
        kind: ``"alter"`` (every other dim), ``"new"`` or ``"old"`` (halves).
        dim: number of variables, at least 2.
        layers: pairs of masks.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if dim < 2 or layers < 1:
        raise ValueError(f"dim, layers: expected at least 2 and 1, got {dim} and {layers}")
    i = torch.arange(dim)
    if kind == "alter":
        pair = i % 2, (i.flip(0) + 1) % 2
    elif kind == "new":
        half = (i // (dim // 2)).clamp(max=1)
        pair = half, half.flip(0)
    elif kind == "old":
        half = i // ((dim + 1) // 2)
        pair = half, half.flip(0)
    else:
        raise ValueError(f'kind: expected "alter", "new" or "old", got {kind!r}')
    return torch.stack(pair).repeat(layers, 1).float()


class FusedRealNVP(FusedFlow):
    """The methods of a fused RealNVP."""

    forward_p: Callable[..., Tensor]
    backward_p: Callable[..., tuple[Tensor, Tensor]]

    def _describe(self) -> FlowProgram:
        return program(self)

    def forward_p(self, z: Tensor, x_cond: Tensor | None = None) -> Tensor:  # type: ignore[no-redef]
        """Latent z (N, D), condition (N, C) -> data (N, D)."""
        fused = self._fused_rows(z, x_cond, rev=True)
        return super().forward_p(z, x_cond) if fused is None else fused[0]  # type: ignore[misc]

    def backward_p(  # type: ignore[no-redef]
        self, x: Tensor, x_cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data x (N, D), condition (N, C) -> latent (N, D), log|det dz/dx| (N,)."""
        fused = self._fused_rows(x, x_cond, rev=False)
        return super().backward_p(x, x_cond) if fused is None else fused  # type: ignore[misc]

    def _fused_rows(
        self, x: Tensor, x_cond: Tensor | None, rev: bool
    ) -> tuple[Tensor, Tensor] | None:
        if self._delegates():
            return None
        try:
            width = sum(self._dims()[1])
            if (x_cond is None) != (width == 0):
                got = "None" if x_cond is None else "a tensor"
                raise ValueError(f"x_cond: expected {width} columns, got {got}")
            conditions = [] if x_cond is None else [x_cond]
            return self._run_rows(x, conditions, rev, ("z" if rev else "x", "x_cond"))
        except UnsupportedFlow:
            return None


class _Plain(nn.Module):
    """What POCO's class computes, in plain PyTorch."""

    mask: Tensor

    def __init__(
        self, nets: NetMaker, nett: NetMaker, flow_arch: Sequence[int], mask: Tensor, prior: Any
    ) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("mask", mask)
        self.t = nn.ModuleList(nett(*flow_arch) for _ in range(len(mask)))
        self.s = nn.ModuleList(nets(*flow_arch) for _ in range(len(mask)))

    def forward_p(self, z: Tensor, x_cond: Tensor | None = None) -> Tensor:
        for i in range(len(self.mask)):
            s, t = self._scale_shift(z, x_cond, i)
            z = self.mask[i] * z + (1 - self.mask[i]) * (z * torch.exp(s) + t)
        return z

    def backward_p(self, x: Tensor, x_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_jac = x.new_zeros(len(x))
        for i in reversed(range(len(self.mask))):
            s, t = self._scale_shift(x, x_cond, i)
            x = self.mask[i] * x + (1 - self.mask[i]) * (x - t) * torch.exp(-s)
            log_jac = log_jac - s.sum(1)
        return x, log_jac

    def _scale_shift(self, x: Tensor, x_cond: Tensor | None, i: int) -> tuple[Tensor, Tensor]:
        rows = self.mask[i] * x
        if x_cond is not None:
            rows = torch.cat([rows, x_cond], 1)
        return self.s[i](rows) * (1 - self.mask[i]), self.t[i](rows) * (1 - self.mask[i])


class RealNVP(FusedRealNVP, _Plain):
    """POCO's ``RealNVP``, fused: a flow of masked affine couplings, ``x exp(s) + t``.

    Same constructor, parameters, ``state_dict`` keys and methods as POCO's; ``forward`` is
    ``log_prob`` (POCO's lacks the condition).

    Args:
        nets: makes a subnet for s, ``nets(inputs, hidden, outputs)``; fused where it is an MLP
            that ends with Tanh.
        nett: the same for t, without the Tanh.
        flow_arch: inputs (D + C), hidden and outputs (D) of the subnets.
        mask: (L, D), one row per coupling, 1 for dims that are passed on
            (:func:`realnvp_masks`).
        prior: distribution of the latent over D dims, such as ``MultivariateNormal``.
    """

    def log_prob(self, x: Tensor, x_cond: Tensor | None = None) -> Tensor:
        """Data x (N, D), condition (N, C) -> log-density in nats (N,)."""
        self._move_prior(x.device)
        z, log_jac = self.backward_p(x, x_cond)
        return self.prior.log_prob(z) + log_jac

    def sample(self, n: int, x_cond: Tensor | None = None) -> Tensor:
        """n samples of the prior, condition (n, C) -> data (n, D)."""
        return self.forward_p(self.prior.sample((n,)).to(self.mask.device), x_cond)

    def forward(self, x: Tensor, x_cond: Tensor | None = None) -> Tensor:
        """As :meth:`log_prob`."""
        return self.log_prob(x, x_cond)

    def _move_prior(self, device: torch.device) -> None:
        prior = self.prior  # no module: it does not follow .to()
        if isinstance(prior, torch.distributions.MultivariateNormal) and prior.loc.device != device:
            self.prior = torch.distributions.MultivariateNormal(
                prior.loc.to(device), scale_tril=prior.scale_tril.to(device)
            )


def fused_class(module: nn.Module) -> type | None:
    """The fused class for a RealNVP of POCO; None for anything else."""
    if isinstance(module, FusedFlow) or not _is_pocos(module):
        return None
    kind: Any = type(module)
    return adopted(kind, FusedRealNVP)
