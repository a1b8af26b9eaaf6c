"""Modules under the names, with the attributes and the arithmetic of nflows, for tests without it.

Written from what nflows 0.14 computes; ``upstream=False`` makes the residual net of the fork that
ProHMR uses, in which the context enters at the first Linear only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The front end knows nflows' modules by the package that they say they are from.
sys.modules["nflows.stand_ins"] = sys.modules[__name__]
__name__ = "nflows.stand_ins"


class Transform(nn.Module):
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        raise NotImplementedError


class CompositeTransform(Transform):
    def __init__(self, transforms: list[nn.Module]) -> None:
        super().__init__()
        self._transforms = nn.ModuleList(transforms)

    @staticmethod
    def _cascade(inputs: Tensor, functions: Any, context: Tensor | None) -> Any:
        total = inputs.new_zeros(len(inputs))
        for function in functions:
            inputs, change = function(inputs, context)
            total = total + change
        return inputs, total

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return self._cascade(inputs, self._transforms, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        backwards = (transform.inverse for transform in reversed(self._transforms))
        return self._cascade(inputs, backwards, context)


class ActNorm(Transform):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(False))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        if self.training and not self.initialized:
            with torch.no_grad():
                std = inputs.std(0)
                self.log_scale.data = -torch.log(std)
                self.shift.data = -(inputs / std).mean(0)
                self.initialized.data = torch.tensor(True)
        log_jac = self.log_scale.sum() * inputs.new_ones(len(inputs))
        return self.log_scale.exp() * inputs + self.shift, log_jac

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        log_jac = -self.log_scale.sum() * inputs.new_ones(len(inputs))
        return (inputs - self.shift) / self.log_scale.exp(), log_jac


class LULinear(Transform):
    def __init__(self, features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        entries = features * (features - 1) // 2
        self.bias = nn.Parameter(torch.zeros(features))
        self.lower_entries = nn.Parameter(torch.zeros(entries))
        self.upper_entries = nn.Parameter(torch.zeros(entries))
        self.unconstrained_upper_diag = nn.Parameter(torch.zeros(features))

    def _weight(self) -> tuple[Tensor, Tensor]:
        lower = self.bias.new_zeros(self.features, self.features)
        upper = self.bias.new_zeros(self.features, self.features)
        diagonal = F.softplus(self.unconstrained_upper_diag) + self.eps
        entries = iter(self.lower_entries), iter(self.upper_entries)
        for i in range(self.features):
            lower[i, i], upper[i, i] = 1.0, diagonal[i]
            for j in range(i):
                lower[i, j] = next(entries[0])
            for j in range(i + 1, self.features):
                upper[i, j] = next(entries[1])
        return lower @ upper, diagonal.log().sum()

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        weight, log_jac = self._weight()
        return inputs @ weight.mT + self.bias, log_jac * inputs.new_ones(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        weight, log_jac = self._weight()
        outputs = torch.linalg.solve(weight, (inputs - self.bias).mT).mT
        return outputs, -log_jac * inputs.new_ones(len(inputs))


class Permutation(Transform):
    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        self._dim = 1
        self.register_buffer("_permutation", permutation)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return inputs[:, self._permutation], inputs.new_zeros(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return inputs[:, self._permutation.argsort()], inputs.new_zeros(len(inputs))


class RandomPermutation(Permutation):
    def __init__(self, features: int) -> None:
        super().__init__(torch.randperm(features))


class ReversePermutation(Permutation):
    def __init__(self, features: int) -> None:
        super().__init__(torch.arange(features - 1, -1, -1))


class CouplingTransform(Transform):
    multiplier = 1

    def __init__(self, mask: Tensor, make_net: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.features = len(mask)
        order = torch.arange(self.features)
        self.register_buffer("identity_features", order[mask <= 0])
        self.register_buffer("transform_features", order[mask > 0])
        outputs = self.multiplier * len(self.transform_features)
        self.transform_net = make_net(len(self.identity_features), outputs)
        self.unconditional_transform = None

    def _scale_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _couple(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> Any:
        raw = self.transform_net(inputs[:, self.identity_features], context)
        scale, shift = self._scale_and_shift(raw)
        active, outputs = inputs[:, self.transform_features], inputs.clone()
        changed = (active - shift) / scale if inverse else active * scale + shift
        outputs[:, self.transform_features] = changed
        log_jac = scale.log().sum(1)
        return outputs, -log_jac if inverse else log_jac

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return self._couple(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return self._couple(inputs, context, True)


class AffineCouplingTransform(CouplingTransform):
    multiplier = 2

    def _scale_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        size = len(self.transform_features)
        return torch.sigmoid(raw[:, size:] + 2) + 1e-3, raw[:, :size]


class AdditiveCouplingTransform(AffineCouplingTransform):
    multiplier = 1

    def _scale_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(raw), raw


class ResidualBlock(nn.Module):
    def __init__(
        self,
        features: int,
        context_features: int | None,
        activation: Any,
        dropout: float,
        use_batch_norm: bool,
    ) -> None:
        super().__init__()
        self.activation, self.use_batch_norm = activation, use_batch_norm
        if use_batch_norm:
            self.batch_norm_layers = nn.ModuleList(
                nn.BatchNorm1d(features, eps=1e-3) for _ in range(2)
            )
        if context_features is not None:
            self.context_layer = nn.Linear(context_features, features)
        self.linear_layers = nn.ModuleList(nn.Linear(features, features) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = inputs
        for i in range(2):
            if self.use_batch_norm:
                hidden = self.batch_norm_layers[i](hidden)
            hidden = self.activation(hidden)
            hidden = self.linear_layers[i](self.dropout(hidden) if i else hidden)
        if context is not None:
            hidden = F.glu(torch.cat([hidden, self.context_layer(context)], 1), 1)
        return inputs + hidden


class ResidualNet(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        context_features: int | None,
        blocks: int,
        activation: Any = F.relu,
        upstream: bool = True,
        dropout: float = 0.0,
        use_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.upstream, self.context_features = upstream, context_features
        self.initial_layer = nn.Linear(inputs + (context_features or 0), hidden)
        gated = context_features if upstream else None
        self.blocks = nn.ModuleList(
            ResidualBlock(hidden, gated, activation, dropout, use_batch_norm) for _ in range(blocks)
        )
        self.final_layer = nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        rows = inputs if context is None else torch.cat([inputs, context], 1)
        hidden = self.initial_layer(rows)
        for block in self.blocks:
            hidden = block(hidden, context if self.upstream else None)
        return self.final_layer(hidden)


class StandardNormal(nn.Module):
    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self._shape = torch.Size(shape)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(inputs).sum(1)

    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        if context is None:
            return torch.randn(num_samples, *self._shape)
        shape = (len(context), num_samples, *self._shape)
        return torch.randn(shape[0] * num_samples, *self._shape).to(context.dtype).reshape(shape)

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        samples = self.sample(num_samples, context)
        return samples, self.log_prob(samples.reshape(-1, *self._shape)).reshape(samples.shape[:-1])


class Flow(nn.Module):
    def __init__(self, transform: nn.Module, distribution: nn.Module) -> None:
        super().__init__()
        self._transform, self._distribution = transform, distribution
        self._embedding_net = nn.Identity()

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        embedded = self._embedding_net(context)
        noise, log_jac = self._transform(inputs, context=embedded)
        return self._distribution.log_prob(noise, context=embedded) + log_jac

    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        return self._sample(num_samples, context)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return self._transformed(self._distribution.sample, num_samples, context)[0]

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        samples, log_jac, drawn = self._transformed(
            self._distribution.sample_and_log_prob, num_samples, context
        )
        return samples, drawn[1] - log_jac

    def _transformed(self, draw: Any, num_samples: int, context: Tensor | None) -> Any:
        embedded = self._embedding_net(context)
        drawn = draw(num_samples, context=embedded)
        noise = drawn[0] if isinstance(drawn, tuple) else drawn
        rows = None if embedded is None else embedded.repeat_interleave(num_samples, 0)
        samples, log_jac = self._transform.inverse(noise.reshape(-1, noise.shape[-1]), context=rows)
        return samples.reshape(noise.shape), log_jac.reshape(noise.shape[:-1]), drawn

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self._transform(inputs, context=self._embedding_net(context))[0]
