"""Shared by the tests: the golden data and the flows that it describes.

The golden files hold inputs and outputs of the official implementations: ``in/`` inputs, ``sd/``
weights, ``out/`` their float32 results, ``out64/`` the same in float64; ``grad/``, ``ginv/`` (and
``64``) gradients of the forward and of the inverse direction. A selection lies in ``tests/golden``;
where the environment variable ``FASTHYP_GOLDEN`` names one or more folders (separated by ``:``),
the tests run over the files there too.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasthyp.flows import ConditionalGlow, RealNVP, realnvp_masks
from fasthyp.flows.freia_master import MasterAllInOneBlock
from tests.replays import replays  # noqa: F401

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # the tensors are small; tests of threads set a number of their own


def golden_files(pattern: str) -> list[Any]:
    """The golden files that match a glob pattern, as pytest parameters."""
    folders = [GOLDEN, *map(Path, filter(None, os.environ.get("FASTHYP_GOLDEN", "").split(":")))]
    found = [path for folder in folders for path in sorted(folder.glob(pattern))]
    assert found, f"no golden file {pattern} in {folders}"
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in found]


class Golden:
    """One golden file: ``g["out/z"]`` is a tensor, ``g.meta`` what is known about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = np.load(path)
        self.names: list[str] = self._data.files
        self.meta: dict[str, Any] = json.loads(str(self._data["meta"]))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._data[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, under the keys of the official code."""
        return {name[3:]: self[name] for name in self.names if name.startswith("sd/")}

    def freia(self) -> ff.GraphINN | ff.SequenceINN:
        """The FrEIA flow that made the file, in eval mode."""
        kind = self.path.stem.removeprefix("freia_")
        if kind.startswith(("glow", "head_glow")):
            # humr_small-like files leave some settings out: FrEIA's defaults
            names = ("clamp", "clamp_activation", "split_len")
            settings = {k: self.meta[k] for k in names if self.meta.get(k)}
            net = self._graph(fm.GLOWCouplingBlock, settings)
        elif kind == "other_sequence":
            net = self._mixed_sequence()
        elif "allinone" in kind:
            net = self._all_in_one(kind.startswith("head_"))
        else:
            block = {
                "rnvp": fm.RNVPCouplingBlock,
                "rnvp_tanh": fm.RNVPCouplingBlock,
                "nice": fm.NICECouplingBlock,
                "gin": fm.GINCouplingBlock,
                "onesided": fm.AffineCouplingOneSided,
                "condaffine": fm.ConditionalAffineTransform,
            }[kind.removeprefix("other_")]
            net = self._graph(block, ast.literal_eval(self.meta["args"]))
        net.load_state_dict(self.state_dict())
        return net.eval()

    def conditional_glow(self) -> ConditionalGlow:
        """The flow of ProHMR that made the file, with its weights."""
        names = (
            *("features", "hidden_features", "num_layers", "num_blocks_per_layer"),
            *("context_features", "batch_norm_within_layers", "dropout_probability"),
        )
        flow = ConditionalGlow(**{name: self.meta[name] for name in names})
        flow.load_state_dict(self.state_dict())
        return flow.eval()

    def realnvp(self, dtype: torch.dtype = torch.float32) -> RealNVP:
        """The flow of POCO that made the file."""
        dim, width, hidden = (self.meta[name] for name in ("num_nf_rv", "context", "hidden"))
        prior = torch.distributions.MultivariateNormal(
            torch.zeros(dim, dtype=dtype), torch.eye(dim, dtype=dtype)
        )
        masks = realnvp_masks(self.meta["mask_type"], dim, self.meta["num_flow_layers"])
        flow = RealNVP(poco_s, poco_t, (dim + width, hidden, dim), masks, prior)
        assert torch.equal(masks, self["sd/mask"])
        flow.load_state_dict(self.state_dict())
        return flow.to(dtype)

    def _graph(self, block: Any, settings: dict[str, Any]) -> ff.GraphINN:
        """Blocks and permutations in turn."""
        weights, meta = self.state_dict(), self.meta
        nodes = [ff.InputNode(meta["dim"], name="input")]
        conditions = [ff.ConditionNode(c, name=f"cond{i}") for i, c in enumerate(meta["cond_dims"])]
        for k in range(meta["blocks"]):
            subnets = _Subnets(weights, f"module_list.{2 * k}.")
            arguments = {**settings, "subnet_constructor": subnets}
            nodes.append(ff.Node(nodes[-1], block, arguments, conditions))
            nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {"seed": k}))
        nodes.append(ff.OutputNode(nodes[-1], name="output"))
        return ff.GraphINN([*nodes, *conditions])

    def _all_in_one(self, master: bool) -> ff.SequenceINN:
        net = ff.SequenceINN(self.meta["dim"])
        for k in range(self.meta["blocks"]):
            self._append(
                net,
                MasterAllInOneBlock if master else fm.AllInOneBlock,
                0 if self.meta["cond_dims"] else None,
                **ast.literal_eval(self.meta["args"]),
                subnet_constructor=_Subnets(self.state_dict(), f"module_list.{k}."),
            )
        return net

    def _mixed_sequence(self) -> ff.SequenceINN:
        net = ff.SequenceINN(self.meta["dim"])
        for k, (block, cond, settings) in enumerate(
            [
                (fm.GLOWCouplingBlock, 0, {"clamp": 2.0}),
                (fm.PermuteRandom, None, {"seed": 3}),
                (fm.RNVPCouplingBlock, 1, {"clamp": 1.0}),
                (fm.PermuteRandom, None, {"seed": 4}),
                (fm.NICECouplingBlock, None, {}),
                (fm.PermuteRandom, None, {"seed": 5}),
                (fm.AllInOneBlock, 1, {}),
                (fm.GINCouplingBlock, 0, {"clamp": 2.0}),
            ]
        ):
            if block is not fm.PermuteRandom:
                subnets = _Subnets(self.state_dict(), f"module_list.{k}.")
                settings = {**settings, "subnet_constructor": subnets}
            self._append(net, block, cond, **settings)
        return net

    def _append(self, net: ff.SequenceINN, block: Any, cond: int | None, **settings: Any) -> None:
        shape = None if cond is None else (self.meta["cond_dims"][cond],)
        net.append(block, cond=cond, cond_shape=shape, **settings)


def poco_s(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """POCO's subnet for s."""
    return nn.Sequential(*poco_t(inputs, hidden, outputs), nn.Tanh())


def poco_t(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """POCO's subnet for t."""
    widths = (inputs, hidden, hidden, outputs)
    linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(linears[0], nn.LeakyReLU(), linears[1], nn.LeakyReLU(), linears[2])


class _Subnets:
    """Makes the subnets of a block, each as the weights under its name are."""

    def __init__(self, weights: dict[str, Tensor], prefix: str) -> None:
        ends = ("F", "G", "subnet", *(f"subnet{x}{k}" for k in (1, 2) for x in ("", "_s", "_t")))
        used = [name for name in ends if f"{prefix}{name}.0.weight" in weights]
        self._rest = iter([_mlp(weights, f"{prefix}{name}.") for name in used])

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        return next(self._rest)


def _mlp(weights: dict[str, Tensor], prefix: str) -> nn.Sequential:
    """Linear layers at the places that the keys give; ReLU, after Dropout(0), between them."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.weight")
    places = sorted(int(m[1]) for key in weights if (m := pattern.fullmatch(key)))
    parts: list[nn.Module] = []
    for place in places:
        if parts:
            parts += [nn.Dropout(0.0)] * (place - len(parts) - 1) + [nn.ReLU()]
        outputs, inputs = weights[f"{prefix}{place}.weight"].shape
        parts.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*parts)


@pytest.fixture(autouse=True)
def _quiet_freia() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ReversibleGraphNet", category=DeprecationWarning)
        yield


def random_flow(
    dim: int,
    cond_dims: tuple[int, ...] = (),
    blocks: int = 4,
    hidden: int = 32,
    framework: Any = ff,
    modules: Any = fm,
    graph: str = "GraphINN",
    subnet: Any = None,
    spread: float = 2.0,
    **settings: Any,
) -> Any:
    """A flow of ``blocks`` GLOW couplings and permutations with random weights, in eval mode.

    ``framework`` and ``modules`` are FrEIA's or ``fasthyp.flows``; ``spread`` scales the last
    layers, so that the clamps are at work.
    """

    def mlp(inputs: int, outputs: int) -> nn.Module:
        parts = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        with torch.no_grad():
            parts[2].weight.mul_(spread)
        return parts

    settings = {"subnet_constructor": subnet or mlp, **settings}
    if graph == "SequenceINN":
        net = framework.SequenceINN(dim)
        for k in range(blocks):
            place = k % len(cond_dims) if cond_dims else None
            shape = None if place is None else (cond_dims[place],)
            net.append(modules.GLOWCouplingBlock, cond=place, cond_shape=shape, **settings)
            net.append(modules.PermuteRandom, seed=k)
        return net.eval()
    nodes = [framework.InputNode(dim, name="input")]
    conditions = [framework.ConditionNode(c, name=f"cond{i}") for i, c in enumerate(cond_dims)]
    for k in range(blocks):
        nodes.append(
            framework.Node(nodes[-1], modules.GLOWCouplingBlock, dict(settings), conditions)
        )
        nodes.append(framework.Node(nodes[-1], modules.PermuteRandom, {"seed": k}))
    nodes.append(framework.OutputNode(nodes[-1], name="output"))
    return getattr(framework, graph)([*nodes, *conditions]).eval()


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute deviation."""
    difference = (value.double() - exact.double()).detach().abs()
    return float(difference.max()) if value.numel() else 0.0


def assert_as_good_as(
    value: Tensor, peer: Tensor, exact: Tensor, name: str = "", times: float = 2.0
) -> None:
    """The float32 ``value`` deviates from the float64 ``exact`` at most ``times`` as much as
    ``peer`` does; a few roundings of the largest element are always allowed, as a peer may be
    lucky (with few elements it often is)."""
    assert value.shape == exact.shape, name
    assert value.dtype == peer.dtype, name
    roundings = 4 * times * torch.finfo(torch.float32).eps
    floor = roundings * float(exact.abs().max()) if exact.numel() else 0.0
    allowed = max(times * max_error(peer, exact), floor)
    assert max_error(value, exact) <= allowed, (
        f"{name}: error {max_error(value, exact):.2e}, peer {max_error(peer, exact):.2e}, "
        f"allowed {allowed:.2e}"
    )
