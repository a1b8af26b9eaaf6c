"""``fasthyp.accelerate``, ``restore`` and ``explain``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import FrEIA.modules as fm
from torch import Tensor, nn

from fasthyp.body import smplx_modules
from fasthyp.flows import nflows, realnvp
from fasthyp.flows.describe import describe, is_flow
from fasthyp.flows.executor import check_checkpoint, check_precision
from fasthyp.flows.freia_modules import MODULES, NODES
from fasthyp.flows.fused import FusedFlow
from fasthyp.flows.program import AffineKind, Opaque, UnsupportedFlow

_originals: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def accelerate(
    module: nn.Module,
    inplace: bool = False,
    precision: str = "highest",
    checkpoint: str = "reversible",
) -> nn.Module:
    """Run the flows of a model on fused kernels; parameters, keys and numbers stay the same.

    FrEIA's ``GraphINN``, ``ReversibleGraphNet``, ``SequenceINN`` and coupling blocks, alone or
    anywhere inside the model, become the drop-in classes of :mod:`fasthyp.flows`; flows of nflows
    and of POCO get fused subclasses of their own classes, and so do bodies of smplx, whose
    skinning then is :func:`fasthyp.body.lbs`. What cannot be fused keeps working as it
    was; :func:`explain` says what and why.

    Changed weights are noticed at the next call, except when they were changed in place through
    ``parameter.data``, which PyTorch does not count: then call ``train()`` or ``eval()`` once.

    Args:
        module: any module.
        inplace: change the classes inside ``module`` itself; otherwise return a structural copy
            that shares every parameter and buffer with it.
        precision: ``"highest"`` (float32), ``"high"`` or ``"medium"``; gradients are computed in
            float32 on a CPU whatever it is.
        checkpoint: what a pass keeps for its gradient. ``"reversible"``: D numbers per row and
            block, from which the backward pass reconstructs what it needs. ``"store"``: the hidden
            layers too, which are then not computed again.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``, or cannot be copied.
        ValueError: unknown precision or checkpoint.
    """
    _check_module(module)
    check_precision(precision)
    check_checkpoint(checkpoint)
    target = module if inplace else shared_clone(module)
    for part in target.modules():
        fused = _fused_class(part)
        if fused is not None:
            part.__dict__.setdefault("_accelerated_from", type(part))
            part.__dict__.pop("_flow", None)
            part.__dict__["precision"] = precision
            part.__dict__["checkpoint"] = checkpoint
            part.__class__ = fused
            for node in getattr(part, "node_list", ()):
                if type(node) in NODES:
                    node.__dict__["_accelerated_from"] = type(node)
                    node.__class__ = NODES[type(node)]
    if not inplace:
        _originals[target] = module
    return target


def _fused_class(part: Any) -> Any:
    """The class that runs this part fused; None for one that has no fused form."""
    if isinstance(part, FusedFlow):
        return type(part)
    return (
        MODULES.get(type(part))
        or nflows.fused_class(part)
        or realnvp.fused_class(part)
        or smplx_modules.fused_class(part)
    )


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: the very object that was passed to it.

    For a model accelerated in place, and for a copy or unpickled form of an accelerated model, the
    classes inside are changed back and the same object is returned.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_module(model)
    original = _originals.get(model)
    if original is not None:
        return original
    for part in model.modules():
        for item in (part, *getattr(part, "node_list", ())):
            if "_accelerated_from" in item.__dict__:
                item.__class__ = item.__dict__.pop("_accelerated_from")
                for key in ("_flow", "precision", "checkpoint"):
                    item.__dict__.pop(key, None)
    return model


def shared_clone(module: nn.Module) -> Any:
    """A deep copy of the modules that shares every parameter, buffer and tensor attribute."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers, part.__dict__):
            memo.update((id(v), v) for v in table.values() if isinstance(v, Tensor))
    # The nodes of a graph form a linked list, too deep for a recursive copy: one node at a time.
    nodes = [node for part in module.modules() for node in getattr(part, "node_list", ())]
    memo.update((id(node), object.__new__(type(node))) for node in nodes)
    try:
        for node in nodes:
            memo[id(node)].__dict__.update(copy.deepcopy(node.__dict__, memo))
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"module: {type(module).__name__} cannot be copied ({error}); use inplace=True"
        ) from error


@dataclass
class Report:
    """What of a model runs fused. ``str()`` gives a table.

    Attributes:
        rows: one dict per flow, and per part of it that is not fused, with keys ``name`` (as in
            ``named_modules``), ``kind`` (class), ``accelerated`` (bool) and ``reason``.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, kind: str, accelerated: bool, reason: str) -> None:
        self.rows.append({"name": name, "kind": kind, "accelerated": accelerated, "reason": reason})

    def __str__(self) -> str:
        table = [("name", "kind", "fused", "reason")]
        for row in self.rows:
            fused = "yes" if row["accelerated"] else "no"
            table.append((row["name"] or "(model)", row["kind"], fused, row["reason"]))
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]])
            for line in table
        )


def explain(model: nn.Module) -> Report:
    """Which flows of a model run fused, which parts do not, and why.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_module(model)
    report = Report()
    inside: set[int] = set()  # parts that run within the program of a flow
    for name, part in model.named_modules():
        if id(part) in inside:
            continue
        if is_flow(part):
            if _explain_flow(report, name, part):
                inside.update(map(id, part.modules()))
        elif smplx_modules.is_smplx(part):
            fused = isinstance(part, smplx_modules.FusedSkinning)
            reason = "skinning by fasthyp.body.lbs" if fused else "not accelerated"
            report.add(name, type(part).__name__, fused, reason)
        elif isinstance(part, fm.InvertibleModule) and not isinstance(part, fm.PermuteRandom):
            report.add(name, type(part).__name__, False, "no fused form of this block")
    if not report.rows:
        report.add("", type(model).__name__, False, "holds no flow and no body")
    return report


def _explain_flow(report: Report, name: str, part: nn.Module) -> bool:
    """Add the rows of one flow; True when a program covers everything inside."""
    kind = type(part).__name__
    try:
        program = part.flow().program if isinstance(part, FusedFlow) else describe(part)
    except UnsupportedFlow as error:
        report.add(name, kind, False, f"runs its own forward: {error}")
        return False
    if not isinstance(part, FusedFlow):
        how = "not accelerated" if _fused_class(part) else "no fused form of this class"
        report.add(name, kind, False, f"{how}: runs its own forward")
        return False
    report.add(name, kind, *part.flow().explain())
    names = {id(module): subname for subname, module in part.named_modules()}
    for step in program.couplings:
        opaque = [subnet for subnet in step.subnets if isinstance(subnet, Opaque)]
        for subnet in opaque:
            subname, subkind = names[id(subnet.module)], type(subnet.module).__name__
            reason = f"runs as a torch module: {subnet.reason}"
            report.add(f"{name}.{subname}" if name else subname, subkind, False, reason)
        if not opaque and isinstance(step.kind, AffineKind) and step.kind.clamp_fn is not None:
            subname = next(found for found in names.values() if found.endswith(step.name))
            subname = f"{name}.{subname}" if name else subname
            report.add(subname, "clamp", False, "a clamp function without a fused form: reference")
    return True


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
