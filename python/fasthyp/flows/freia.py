"""FrEIA front end: its chains of coupling blocks, permutations and linear maps as programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import torch
from FrEIA.modules.orthogonal import _fast_h
from torch import Tensor, nn

from fasthyp.flows.clamps import GLOBAL_SCALES, ScaledAtan, clamp_name, known_name
from fasthyp.flows.freia_old import OldInputNode, OldPermuteRandom
from fasthyp.flows.parts import act_norm, computes_as, require_plain, subnet
from fasthyp.flows.program import (
    AdditiveKind,
    AffineKind,
    Coupling,
    FlowProgram,
    Linear,
    Permute,
    Step,
    UninitializedFlow,
    UnsupportedFlow,
    Watch,
)
from fasthyp.reference.coupling import CouplingLayer, LinearMap, log_scale

COUPLINGS = (
    fm.GLOWCouplingBlock,
    fm.RNVPCouplingBlock,
    fm.NICECouplingBlock,
    fm.GINCouplingBlock,
    fm.AffineCouplingOneSided,
    fm.ConditionalAffineTransform,
    fm.AllInOneBlock,
)


def knows(module: object) -> bool:
    """Whether :func:`describe` is the one for this module."""
    return isinstance(module, (ff.GraphINN, ff.SequenceINN, *COUPLINGS))


def describe(module: nn.Module) -> FlowProgram:
    """The program of a ``GraphINN``, ``ReversibleGraphNet``, ``SequenceINN`` or coupling block.

    Raises:
        UnsupportedFlow: not a chain of known blocks over vectors; the message says where.
    """
    if not computes_as(module, "FrEIA", "forward"):
        raise UnsupportedFlow(f"{type(module).__name__} has a forward of its own")
    watch = Watch()
    if isinstance(module, ff.GraphINN):
        program = _describe_graph(module, watch)
    elif isinstance(module, ff.SequenceINN):
        program = _describe_sequence(module, watch)
    else:
        program = _describe_block(module, watch)
    if not (program.tensors() or program.opaque):
        raise UnsupportedFlow("it does nothing but permute")
    return program


def _describe_graph(net: ff.GraphINN, watch: Watch) -> FlowProgram:
    if len(net.in_nodes) != 1 or len(net.out_nodes) != 1:
        raise UnsupportedFlow("it has several inputs or outputs")
    (dim,) = _vector(net.in_nodes[0].dims, "input")
    columns: dict[ff.ConditionNode, tuple[int, ...]] = {}
    cond_dims: list[int] = []
    for node in net.condition_nodes:
        (width,) = _vector(node.dims, f"condition {node.name}")
        start = sum(cond_dims)
        columns[node] = tuple(range(start, start + width))
        cond_dims.append(width)

    names = {id(module): f"module_list.{i}" for i, module in enumerate(net.module_list)}
    steps: list[Step] = []
    node, count = net.in_nodes[0], 0
    while True:
        if len(node.outputs) != 1 or node.outputs[0] is None:
            raise UnsupportedFlow(f"{node} does not have exactly one output")
        node = node.outputs[0][0]
        if node is net.out_nodes[0]:
            break
        if len(node.inputs) != 1:
            raise UnsupportedFlow(f"{node} has {len(node.inputs)} inputs")
        watch.attributes(node, "module")
        cond = tuple(i for c in node.conditions for i in columns[c])
        steps += _steps(node.module, cond, names.get(id(node.module), node.name), watch)
        count += 1
    if count != len(net.module_list):
        raise UnsupportedFlow("its nodes are not one chain")
    return FlowProgram(dim, cond_dims, steps, watch)


def _describe_sequence(net: ff.SequenceINN, watch: Watch) -> FlowProgram:
    (dim,) = _vector(net.shapes[0], "input")
    widths: dict[int, int] = {}
    for index, module in zip(net.conditions, net.module_list, strict=True):
        if index is not None:
            (width,) = _vector(module.dims_c[0], f"condition {index}")
            if widths.setdefault(index, width) != width:
                raise UnsupportedFlow(f"condition {index} has several widths")
    starts, total = {}, 0
    for index in sorted(widths):
        starts[index] = total
        total += widths[index]
    steps: list[Step] = []
    for i, (index, module) in enumerate(zip(net.conditions, net.module_list, strict=True)):
        cond = () if index is None else range(starts[index], starts[index] + widths[index])
        steps += _steps(module, tuple(cond), f"module_list.{i}", watch)
    watch.module(net.module_list)
    return FlowProgram(dim, [widths[index] for index in sorted(widths)], steps, watch)


def _describe_block(block: Any, watch: Watch) -> FlowProgram:
    (dim,) = _vector(block.dims_in[0], "input")
    width = sum(_vector(shape, "condition")[0] for shape in block.dims_c)
    steps = _steps(block, tuple(range(width)), "", watch)
    return FlowProgram(dim, (width,) if width else (), steps, watch)


def _vector(shape: Sequence[int], what: str) -> Sequence[int]:
    if len(shape) != 1:
        raise UnsupportedFlow(f"its {what} has shape {tuple(shape)}, not one dimension")
    return shape


def _steps(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    what, kind = name or "it", type(module).__name__
    for block, steps_of, methods in _BLOCKS:
        if isinstance(module, block):
            require_plain(module, what)
            if not computes_as(module, "FrEIA", "forward", *methods):
                raise UnsupportedFlow(f"{what} is a {kind} with methods of its own")
            watch.module(module)
            try:
                return steps_of(module, cond, name, watch)
            except UnsupportedFlow as error:
                raise type(error)(f"{what} {error}") from None
    raise UnsupportedFlow(f"{what} is a {kind}, which has no fused form")


# --- couplings --------------------------------------------------------------------------------


def _glow(block: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    """x1 changes with subnet2(x2), then x2 with subnet1(the new x1)."""
    x1, x2 = _halves(block, cond, watch)
    kind = _affine(block, centered=isinstance(block, fm.GINCouplingBlock))
    return [
        Coupling(x1, x2, subnet(block.subnet2, watch), kind, cond, _join(name, "subnet2")),
        Coupling(x2, x1, subnet(block.subnet1, watch), kind, cond, _join(name, "subnet1")),
    ]


def _rnvp(block: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    """As GLOW, with subnets of their own for s and t."""
    x1, x2 = _halves(block, cond, watch)
    kind = _affine(block)
    s1, t1 = subnet(block.subnet_s1, watch), subnet(block.subnet_t1, watch)
    s2, t2 = subnet(block.subnet_s2, watch), subnet(block.subnet_t2, watch)
    return [
        Coupling(x1, x2, s2, kind, cond, _join(name, "subnet_s2"), shift_subnet=t2),
        Coupling(x2, x1, s1, kind, cond, _join(name, "subnet_s1"), shift_subnet=t1),
    ]


def _nice(block: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    x1, x2 = _halves(block, cond, watch)
    return [
        Coupling(x1, x2, subnet(block.F, watch), AdditiveKind(), cond, _join(name, "F")),
        Coupling(x2, x1, subnet(block.G, watch), AdditiveKind(), cond, _join(name, "G")),
    ]


def _one_sided(block: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    x1, x2 = _halves(block, cond, watch)
    net, kind = subnet(block.subnet, watch), _affine(block)
    return [Coupling(x2, x1, net, kind, cond, _join(name, "subnet"))]


def _conditional_affine(block: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    x1, x2 = _halves(block, cond, watch)
    net, kind = subnet(block.subnet, watch), _affine(block)
    return [Coupling(x1 + x2, (), net, kind, cond, _join(name, "subnet"))]


def _halves(
    block: Any, cond: tuple[int, ...], watch: Watch
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if block.ndims != 1:
        raise UnsupportedFlow(f"works on {block.ndims}-dimensional data")
    _require_condition(block.condition_length, cond)
    watch.attributes(block, "clamp", "f_clamp", "split_len1")
    split = block.split_len1
    return tuple(range(split)), tuple(range(split, block.channels))


def _require_condition(width: int, cond: tuple[int, ...]) -> None:
    if len(cond) != width:
        raise UnsupportedFlow(f"reads {width} condition columns, has {len(cond)}")


def _affine(block: Any, centered: bool = False) -> AffineKind:
    clamp, function = _clamp(block), block.f_clamp
    if type(function) is ScaledAtan and function.clamp == clamp:
        return AffineKind(clamp, "atan_scaled", centered=centered)
    known = clamp_name(function)
    if known is None:
        return AffineKind(clamp, clamp_fn=function, centered=centered)
    return AffineKind(clamp, known, centered=centered)


def _clamp(block: Any) -> float:
    if not isinstance(block.clamp, (int, float)):
        raise UnsupportedFlow(f"has a clamp of type {type(block.clamp).__name__}")
    return block.clamp


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


# --- AllInOneBlock ----------------------------------------------------------------------------


def _all_in_one(block: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    """[rotation back], coupling of x2 with x1, scale and offset, rotation (or permutation)."""
    if block.input_rank != 0:
        raise UnsupportedFlow(f"works on {block.input_rank + 1}-dimensional data")
    _require_condition(block.condition_channels, cond)
    watch.attributes(block, "clamp", "GIN", "reverse_pre_permute", "global_scale_activation")
    split, dim = block.splits[0], block.in_channels
    kind = AffineKind(*(_clamp(block), _soft_clamp(block)), centered=bool(block.GIN), raw_scale=0.1)
    net = subnet(block.subnet, watch)
    x1, x2 = tuple(range(split)), tuple(range(split, dim))
    rotate, rotate_back = _rotations(block, name, watch)
    steps: list[Step] = [
        Coupling(x2, x1, net, kind, cond, _join(name, "subnet")),
        _global_affine(block, name),
        rotate,
    ]
    return [rotate_back, *steps] if block.reverse_pre_permute else steps


def _soft_clamp(block: Any) -> str:
    """FrEIA 0.2 clamps clamp * tanh(a), later versions clamp * tanh(a / clamp): what this one does
    to a = (u, 0), of which GIN takes the mean off."""
    u = torch.linspace(-50.0, 50.0, 11, dtype=torch.float64)
    raw = torch.stack([u, *u.new_zeros(3, len(u))], 1)
    scale = block._affine(u.new_ones(len(u), 2), raw)[0]
    s = (scale[:, 0] / scale[:, 1]).log()
    for known in ("tanh", "tanh_scaled"):
        expected = log_scale(
            0.1 * u, CouplingLayer((), (), clamp=block.clamp, clamp_activation=known)
        )
        if torch.allclose(s, expected, 1e-9, 1e-9):
            return known
    raise UnsupportedFlow("has a soft clamp of its own")


def _global_affine(block: Any, name: str) -> Linear:
    scale, offset = block.global_scale, block.global_offset
    if block.GIN:
        return Linear((offset,), _offset, diagonal=True, name=name)
    known = known_name(block.global_scale_activation, GLOBAL_SCALES)
    if known is None:
        raise UnsupportedFlow("has a global scale activation of its own")
    evaluate = partial(_scale_offset, GLOBAL_SCALES[known])
    return Linear((scale, offset), evaluate, diagonal=True, name=name)


def _offset(offset: Tensor) -> LinearMap:
    shift = offset.reshape(-1)
    return LinearMap(torch.ones_like(shift), shift, shift.new_zeros(()))


def _scale_offset(
    activation: Callable[[Tensor], Tensor], scale: Tensor, offset: Tensor
) -> LinearMap:
    scale = activation(scale).reshape(-1)
    return LinearMap(scale, offset.reshape(-1), scale.log().sum())


def _rotations(block: Any, name: str, watch: Watch) -> tuple[Step, Step]:
    """What comes after the coupling, and its inverse."""
    if block.householder:
        tensors = block.w_0, block.vk_householder
        return Linear(tensors, _householder, name=name), Linear(
            tensors, _householder_back, name=name
        )
    w, back = block.w_perm, block.w_perm_inv
    if not w.is_floating_point():  # FrEIA after 0.2: indices
        return Permute(w, back, name), Permute(back, w, name)
    watch.values(w, back)
    index, index_back = w.argmax(1), back.argmax(1)
    ones = torch.eye(len(w), dtype=w.dtype, device=w.device)
    if torch.equal(w, ones[index]) and torch.equal(back, ones[index_back]) and not w.requires_grad:
        return Permute(index, index_back, name), Permute(index_back, index, name)
    return Linear((w, back), _matrix, name=name), Linear((back, w), _matrix, name=name)


def _matrix(weight: Tensor, inverse: Tensor) -> LinearMap:
    """A rotation whose inverse is stored; FrEIA takes its determinant for 1."""
    zeros = weight.new_zeros(len(weight))
    return LinearMap(weight, zeros, zeros.sum(), inverse)


def _householder(start: Tensor, vectors: Tensor) -> LinearMap:
    """Reflections at ``vectors`` (K, D) after the rotation ``start``: orthogonal."""
    w = start
    for v in vectors:
        w = w - 2.0 * torch.outer(w @ v, v) / v.dot(v)
    return _matrix(w, w.mT)


def _householder_back(start: Tensor, vectors: Tensor) -> LinearMap:
    w = _householder(start, vectors).weight
    return _matrix(w.mT, w)


# --- permutations and linear maps -------------------------------------------------------------


def _permutation(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    return [Permute(module.perm, module.perm_inv, name)]


def _nothing(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    return []


def _act_norm(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    watch.attributes(module, "init_on_next_batch")
    if module.init_on_next_batch:
        raise UninitializedFlow("is an ActNorm that its first batch will initialise")
    return [act_norm(module.scale, module.bias, name)]


def _fixed_linear(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    """x M + b, of which FrEIA stores M, its inverse and log|det M|."""
    tensors = [module.M, module.M_inv, module.logDetM]
    if isinstance(module.b, Tensor):
        tensors.append(module.b)
    elif module.b:
        raise UnsupportedFlow(f"has an offset of type {type(module.b).__name__}")
    return [Linear(tuple(tensors), _fixed, name=name)]


def _fixed(m: Tensor, inverse: Tensor, log_det: Tensor, b: Tensor | None = None) -> LinearMap:
    shift = m.new_zeros(len(m)) if b is None else b.reshape(-1)
    return LinearMap(m.mT, shift, log_det, inverse=inverse.mT)


def _householder_perm(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Step]:
    if module.conditional:
        raise UnsupportedFlow("is a HouseholderPerm with a condition")
    if module.fixed:
        return [Linear((module.W,), _rotation, name=name)]
    return [Linear((module.Vs,), _reflections, name=name)]


def _rotation(w: Tensor) -> LinearMap:
    return _matrix(w.mT, w)


def _reflections(vectors: Tensor) -> LinearMap:
    return _rotation(_fast_h(vectors).to(vectors.dtype))


# Block, its steps, and which methods beside forward must be FrEIA's.
_BLOCKS: tuple[tuple[Any, Callable[..., list[Step]], tuple[str, ...]], ...] = (
    (fm.GLOWCouplingBlock, _glow, ("_coupling1", "_coupling2")),
    (fm.GINCouplingBlock, _glow, ("_coupling1", "_coupling2")),
    (fm.RNVPCouplingBlock, _rnvp, ("_coupling1", "_coupling2")),
    (fm.NICECouplingBlock, _nice, ("_coupling1", "_coupling2")),
    (fm.AffineCouplingOneSided, _one_sided, ()),
    (fm.ConditionalAffineTransform, _conditional_affine, ()),
    (fm.AllInOneBlock, _all_in_one, ("_affine", "_permute", "_pre_permute")),
    (fm.PermuteRandom, _permutation, ()),
    (OldPermuteRandom, _permutation, ()),
    (OldInputNode, _nothing, ()),
    (fm.ActNorm, _act_norm, ()),
    (fm.FixedLinearTransform, _fixed_linear, ()),
    (fm.HouseholderPerm, _householder_perm, ()),
)
