"""ConditionalGlow of nkolot/nflows, the flow of Kolotouros et al., "Probabilistic Modeling for
Human Mesh Recovery", ICCV 2021, fused.

The classes here compute what those of the fork do, under the same names and ``state_dict`` keys, in
plain PyTorch. :mod:`fasthyp.flows.nflows` describes them as it does the fork's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.fused import FusedFlow, constant
from fasthyp.flows.nflows import FusedTransform, lu_factors
from fasthyp.reference.coupling import standard_normal_log_prob

Activation = Callable[[Tensor], Tensor]
Rows = tuple[Tensor, Tensor]


class Transform(nn.Module):
    """Has ``forward`` and ``inverse``: inputs (N, D), context (N, C) -> outputs, log|det| (N,)."""

    dummy_buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("dummy_buffer", torch.tensor(1.0))


class ActNorm(Transform):
    """``exp(log_scale) x + shift``; the first batch in training mode sets them so that outputs
    have mean 0 and standard deviation 1 (that of the inputs counts as 1e-3 at least)."""

    initialized: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(False))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        if self.training and not self._was_initialized() and not self.initialized:
            self._initialize(inputs.detach())
        outputs = self.log_scale.exp() * inputs + self.shift
        return outputs, self.log_scale.sum().expand(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        outputs = (inputs - self.shift) / self.log_scale.exp()
        return outputs, -self.log_scale.sum().expand(len(inputs))

    @constant
    def _was_initialized(self) -> bool:
        # Compiled code need not look at the buffer once it is true.
        return bool(self.initialized)

    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        std = inputs.std(0).clamp(min=1e-3)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-(inputs / std).mean(0))
        self.initialized.fill_(True)


class LULinear(Transform):
    """``L U x + bias``, the identity at first."""

    def __init__(self, features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        entries = features * (features - 1) // 2
        self.bias = nn.Parameter(torch.zeros(features))
        self.lower_entries = nn.Parameter(torch.zeros(entries))
        self.upper_entries = nn.Parameter(torch.zeros(entries))
        diagonal = torch.full((features,), math.log(math.expm1(1.0 - eps)))
        self.unconstrained_upper_diag = nn.Parameter(diagonal)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return lu_factors(
            self.lower_entries, self.upper_entries, self.unconstrained_upper_diag, self.eps
        )

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        lower, upper = self._factors()
        outputs = F.linear(F.linear(inputs, upper), lower, self.bias)
        return outputs, upper.diagonal().log().sum().expand(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        lower, upper = self._factors()
        columns = (inputs - self.bias).mT
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        outputs = torch.linalg.solve_triangular(upper, columns, upper=True).mT
        return outputs, -upper.diagonal().log().sum().expand(len(inputs))


class ResidualBlock(nn.Module):
    """``h + linear(dropout(f(norm(linear(f(norm(h)))))))``."""

    def __init__(
        self, features: int, activation: Activation, dropout: float, use_batch_norm: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.use_batch_norm = use_batch_norm
        if use_batch_norm:
            self.batch_norm_layers = nn.ModuleList(nn.BatchNorm1d(features) for _ in range(2))
        self.linear_layers = nn.ModuleList(nn.Linear(features, features) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        _init_uniform(self.linear_layers[1], 1e-3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for i, linear in enumerate(self.linear_layers):
            if self.use_batch_norm:
                hidden = self.batch_norm_layers[i](hidden)
            hidden = self.activation(hidden)
            hidden = linear(self.dropout(hidden) if i else hidden)
        return inputs + hidden


class ResidualNet(nn.Module):
    """inputs (N, I), context (N, C) -> (N, O); the context enters at the first Linear."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        context_features: int | None,
        blocks: int,
        activation: Activation,
        dropout: float,
        use_batch_norm: bool,
    ) -> None:
        super().__init__()
        self.context_features = context_features
        self.initial_layer = nn.Linear(inputs + (context_features or 0), hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(hidden, activation, dropout, use_batch_norm) for _ in range(blocks)
        )
        self.final_layer = nn.Linear(hidden, outputs)
        _init_uniform(self.final_layer, 0.01 / math.sqrt(hidden))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        rows = inputs if context is None else torch.cat([inputs, context], 1)
        hidden = self.initial_layer(rows)
        for block in self.blocks:
            hidden = block(hidden)
        return self.final_layer(hidden)


def _init_uniform(linear: nn.Module, bound: float) -> None:
    nn.init.uniform_(linear.weight, -bound, bound)  # type: ignore[arg-type]
    nn.init.uniform_(linear.bias, -bound, bound)  # type: ignore[arg-type]


class AdditiveCouplingTransform(Transform):
    """Shifts the features where ``mask`` is positive by a residual net of the others."""

    identity_features: Tensor
    transform_features: Tensor
    unconditional_transform = None

    def __init__(self, mask: Tensor, make_net: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.features = len(mask)
        self.register_buffer("identity_features", (mask <= 0).nonzero().flatten())
        self.register_buffer("transform_features", (mask > 0).nonzero().flatten())
        self.transform_net = make_net(len(self.identity_features), len(self.transform_features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        return self._add(inputs, context, 1.0)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        return self._add(inputs, context, -1.0)

    def _add(self, inputs: Tensor, context: Tensor | None, sign: float) -> Rows:
        shift = self.transform_net(inputs[:, self.identity_features], context)
        outputs = inputs.index_add(1, self.transform_features, shift, alpha=sign)
        return outputs, inputs.new_zeros(len(inputs))


class _Chain(Transform):
    def __init__(self, transforms: list[Transform]) -> None:
        super().__init__()
        self._transforms = nn.ModuleList(transforms)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        log_jac = inputs.new_zeros(len(inputs))
        for transform in self._transforms:
            inputs, change = transform(inputs, context)
            log_jac = log_jac + change
        return inputs, log_jac

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        log_jac = inputs.new_zeros(len(inputs))
        transform: Any
        for transform in reversed(self._transforms):
            inputs, change = transform.inverse(inputs, context)
            log_jac = log_jac + change
        return inputs, log_jac


class CompositeTransform(FusedTransform, _Chain):
    """Transforms one after the other, fused."""


class ConditionalGlow(FusedFlow):
    """A flow of layers ActNorm, LULinear, additive coupling over vectors, fused.

    Arguments, ``state_dict`` keys, initial values for a given seed, methods and their shapes are
    those of ``nflows.flows.ConditionalGlow`` in nkolot/nflows; nflows is not needed. The couplings
    of the layers change odd and even features in turn. In training mode the first batch sets the
    ActNorms, batch norms use the statistics of their batch, and dropout drops.

    Args:
        features: D.
        hidden_features: width of the residual nets.
        num_layers: layers.
        num_blocks_per_layer: residual blocks per net, of two Linears each.
        activation: a function of tensors.
        dropout_probability: between the Linears of a block.
        context_features: C; None for a flow without context.
        batch_norm_within_layers: whether blocks have batch norms.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_layers: int,
        num_blocks_per_layer: int,
        activation: Activation = F.relu,
        dropout_probability: float = 0.5,
        context_features: int | None = None,
        batch_norm_within_layers: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.context_features = features, context_features

        def net(inputs: int, outputs: int) -> ResidualNet:
            return ResidualNet(
                *(inputs, outputs, hidden_features, context_features, num_blocks_per_layer),
                *(activation, dropout_probability, batch_norm_within_layers),
            )

        mask = torch.ones(features)
        mask[::2] = -1.0
        layers: list[Transform] = []
        for _ in range(num_layers):
            layers += [ActNorm(features), LULinear(features), AdditiveCouplingTransform(mask, net)]
            mask = -mask
        self._transform = CompositeTransform(layers)

    def flow(self) -> FlowExecutor:
        return self._transform.flow()

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Rows:
        """inputs (N, D), context (N, C) -> log-density in nats (N,), latent (N, D).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        _check("inputs", inputs, (-1, self.features))
        self._check_context(context, len(inputs))
        noise, log_jac = self._transform(inputs, context)
        return standard_normal_log_prob(noise) + log_jac, noise

    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """context (B, C) -> samples (B, num_samples, D); (num_samples, D) without context.

        The noise is drawn from PyTorch's default generator, as nflows does.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        samples = self._transform.inverse_shared(self._noise(num_samples, context), context)[0]
        return samples[0] if context is None else samples

    def sample_and_log_prob(
        self, num_samples: int, noise: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """context (B, C) -> samples (B, M, D), log-densities in nats (B, M), noise (B * M, D).

        Without context and ``noise`` the first dimension B is missing.

        Args:
            num_samples: M, where no noise is given.
            noise: the latents to use, (B, M, D); the fork takes M = 1 only.
            context: one row per image.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        drawn = noise is None
        if noise is None:
            noise = self._noise(num_samples, context)
        else:
            _check("noise", noise, (-1, -1, self.features))
            self._check_context(context, len(noise))
        samples, log_jac = self._transform.inverse_shared(noise, context)
        log_prob = standard_normal_log_prob(noise) - log_jac
        if drawn and context is None:
            samples, log_prob = samples[0], log_prob[0]
        return samples, log_prob, noise.flatten(0, 1)

    def _noise(self, num_samples: int, context: Tensor | None) -> Tensor:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int):
            raise TypeError(f"num_samples: expected an int, got {type(num_samples).__name__}")
        if num_samples < 1:
            raise ValueError(f"num_samples: expected a positive number, got {num_samples}")
        self._check_context(context, None)
        images = 1 if context is None else len(context)
        like = next(self.parameters())
        rows = torch.randn(images * num_samples, self.features, device=like.device)
        return rows.to(like.dtype).reshape(images, num_samples, self.features)

    def _check_context(self, context: Tensor | None, rows: int | None) -> None:
        if self.context_features is None:
            if context is not None:
                raise ValueError("context: expected None, as the flow has no context features")
        else:
            _check("context", context, (-1 if rows is None else rows, self.context_features))


def _check(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """A tensor of this shape; -1 stands for any number."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    given = tuple(tensor.shape)
    if len(given) != len(shape) or any(b not in (-1, a) for a, b in zip(given, shape, strict=True)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {given}")
