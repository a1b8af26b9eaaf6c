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
    AdditiveKind,
    AffineKind,
    Coupling,
    FlowProgram,
    Linear,
    Opaque,
    Permute,
    ResidualBlock,
    ResidualMLP,
    UnsupportedFlow,
)

__all__ = [
    "MLP",
    "AdditiveKind",
    "AffineKind",
    "ConditionNode",
    "Coupling",
    "FlowExecutor",
    "FlowProgram",
    "GLOWCouplingBlock",
    "GraphINN",
    "InputNode",
    "Linear",
    "Node",
    "Opaque",
    "OutputNode",
    "Permute",
    "PermuteRandom",
    "Report",
    "ResidualBlock",
    "ResidualMLP",
    "ReversibleGraphNet",
    "SequenceINN",
    "UnsupportedFlow",
    "accelerate",
    "describe",
    "explain",
    "restore",
]
