"""AllInOneBlock of FrEIA's git master, whose checkpoints FrEIA 0.2 cannot read.

Where it differs from 0.2: the clamp is ``clamp * tanh(a / clamp)``, and a hard permutation is a
vector of indices, ``y = x[:, w_perm]``, in the state dict, drawn by PyTorch's generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.flows.freia_modules import AllInOneBlock


class MasterAllInOneBlock(AllInOneBlock):
    """``AllInOneBlock`` as of FrEIA's git master (4212496), fused; arguments as in 0.2."""

    in_channels: int
    householder: int
    clamp: float
    GIN: bool
    sum_dims: tuple[int, ...]

    def __init__(self, *args: Any, permute_soft: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, permute_soft=permute_soft, **kwargs)
        if not (permute_soft or self.householder):
            index = torch.randperm(self.in_channels)
            self.w_perm = nn.Parameter(index, requires_grad=False)
            self.w_perm_inv = nn.Parameter(index.argsort(), requires_grad=False)
            self.permute_function = _columns

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        width = x.shape[1]
        raw, t = 0.1 * a[:, :width], 0.1 * a[:, width:]
        s = self.clamp * torch.tanh(raw / self.clamp)
        if self.GIN:
            s = s - s.mean(self.sum_dims, keepdim=True)
        log_jac = s.sum(self.sum_dims)
        return ((x - t) * torch.exp(-s), -log_jac) if rev else (x * torch.exp(s) + t, log_jac)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    return x[:, index]
