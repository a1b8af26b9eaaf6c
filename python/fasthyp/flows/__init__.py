"""Coupling flows: front ends, the flow as data, and its execution."""

from fasthyp.flows.accelerate import Report, accelerate, explain, restore
from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.freia import describe
from fasthyp.flows.freia_modules import (
    ConditionNode,
    GLOWCouplingBlock,
    GraphINN,
    InputNode,
    Node,
    OutputNode,
    PermuteRandom,
    ReversibleGraphNet,
    SequenceINN,
)
from fasthyp.flows.program import (
    MLP,
    AffineKind,
    Coupling,
    FlowProgram,
    Opaque,
    Permute,
    UnsupportedFlow,
)

__all__ = [
    "MLP",
    "AffineKind",
    "ConditionNode",
    "Coupling",
    "FlowExecutor",
    "FlowProgram",
    "GLOWCouplingBlock",
    "GraphINN",
    "InputNode",
    "Node",
    "Opaque",
    "OutputNode",
    "Permute",
    "PermuteRandom",
    "Report",
    "ReversibleGraphNet",
    "SequenceINN",
    "UnsupportedFlow",
    "accelerate",
    "describe",
    "explain",
    "restore",
]
