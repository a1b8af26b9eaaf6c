"""The ``fasthyp::`` operator library and what every op of it needs.

Ops are registered with ``torch.library.Library.define/impl``, which costs a few microseconds a call
(``torch.library.custom_op`` costs several times that), one op per whole computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasthyp import _C, _environment

LIBRARY = torch.library.Library("fasthyp", "DEF")

if (_level := _environment.simd_level()) is not None:
    _C.set_simd_level(_level)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers an op without a gradient and returns it.

    A gradient that is asked for nevertheless is an error that says so, never a silent zero.
    """
    name = LIBRARY.define(schema)
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    qualified = f"fasthyp::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{qualified} has no gradient; call it through the public function or module, "
            "which takes the differentiable PyTorch path where gradients are needed"
        )

    torch.library.register_autograd(qualified, backward, lib=LIBRARY)
    return getattr(torch.ops.fasthyp, name).default


def address(tensor: Tensor | None) -> int:
    """The data pointer, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def signed(seed: int) -> int:
    """A 64-bit seed as the signed integer of an op's schema."""
    return (seed + 2**63) % 2**64 - 2**63


def current_stream(device: int) -> int:
    """PyTorch's current CUDA stream on that device, as an address."""
    return torch._C._cuda_getCurrentRawStream(device)
