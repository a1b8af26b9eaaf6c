"""The blocks of FrEIA before 0.2, on which the ICCV 2021 checkpoints were trained.

Where they differ from 0.2: the clamp is ``clamp * 0.636 * atan(s / clamp)``; the subnets are
called ``s1`` (changes x2) and ``s2`` (changes x1); odd widths split at ``D // 2``; permutations are
no part of the state dict but rebuilt from their seed; and the input node takes the first place of
``module_list``. The order of the halves is the same: x1 changes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import FrEIA.modules as fm
import numpy as np
import torch
from torch import Tensor, nn

from fasthyp.flows.clamps import ScaledAtan


class OldGLOWCouplingBlock(fm.GLOWCouplingBlock):
    """``GLOWCouplingBlock`` of FrEIA before 0.2, with 0.2's call signature."""

    def __init__(
        self,
        dims_in: Sequence[tuple[int]],
        dims_c: Sequence[tuple[int]] = (),
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        clamp: float = 5.0,
    ) -> None:
        half = dims_in[0][0] // 2
        super().__init__(dims_in, dims_c, subnet_constructor, clamp, ScaledAtan(clamp), half)
        self.s1, self.s2 = self._modules.pop("subnet1"), self._modules.pop("subnet2")

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__({"subnet1": "s1", "subnet2": "s2"}.get(name, name))


class OldPermuteRandom(fm.InvertibleModule):
    """``PermuteRandom`` of FrEIA before 0.2: fixed by its seed alone, nothing in the state dict."""

    def __init__(
        self,
        dims_in: Sequence[tuple[int]],
        dims_c: Sequence[tuple[int]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dims_in, dims_c)
        perm = torch.from_numpy(np.random.RandomState(seed).permutation(dims_in[0][0])).long()
        self.register_buffer("perm", perm, persistent=False)
        self.register_buffer("perm_inv", perm.argsort(), persistent=False)

    def forward(
        self, x: Sequence[Tensor], rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], float]:
        return [x[0][:, self.perm_inv if rev else self.perm]], 0.0

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        return input_dims


class OldInputNode(fm.InvertibleModule):
    """Holds the first place of ``module_list``; passes its input on."""

    def forward(
        self, x: Sequence[Tensor], rev: bool = False, jac: bool = True
    ) -> tuple[Sequence[Tensor], float]:
        return x, 0.0

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        return input_dims
