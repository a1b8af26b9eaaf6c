"""Training and evaluation of the models in `fasthyp.models`; names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasthyp.train.baselines import baseline_errors
    from fasthyp.train.evaluation import evaluate_lifting
    from fasthyp.train.lifting import LiftingTrainConfig
    from fasthyp.train.recipe import Recipe, RecipeConfig, run

SYSTEMS = {
    "humr": "fasthyp.train.humr:HUMRRecipe",
    "poco": "fasthyp.train.poco:POCORecipe",
    "pose_inn": "fasthyp.train.pose_inn:PoseINNRecipe",
    "prohmr": "fasthyp.train.prohmr:ProHMRRecipe",
    "prohmr_lifting": "fasthyp.train.prohmr:ProHMRLiftingRecipe",
    "propose": "fasthyp.train.propose:ProPoseRecipe",
    "regression": "fasthyp.train.regression:RegressionRecipe",
}
"""Recipes by name, for ``fasthyp train``: the module and the class in it."""

_HOME = {
    "LiftingTrainConfig": "fasthyp.train.lifting",
    "Recipe": "fasthyp.train.recipe",
    "RecipeConfig": "fasthyp.train.recipe",
    "baseline_errors": "fasthyp.train.baselines",
    "evaluate_lifting": "fasthyp.train.evaluation",
    "run": "fasthyp.train.recipe",
}

__all__ = [
    "SYSTEMS",
    "LiftingTrainConfig",
    "Recipe",
    "RecipeConfig",
    "baseline_errors",
    "evaluate_lifting",
    "load_recipe",
    "run",
]


def load_recipe(system: str) -> type[Recipe]:
    """The recipe of one of the :data:`SYSTEMS`.

    Raises:
        ValueError: there is none of that name.
        ImportError: Lightning is not installed (``pip install 'fasthyp[train]'``).
    """
    if system not in SYSTEMS:
        raise ValueError(f"system: expected one of {', '.join(SYSTEMS)}, got {system!r}")
    module, name = SYSTEMS[system].split(":")
    try:
        recipe: type[Recipe] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"training needs Lightning: pip install 'fasthyp[train]' ({error})"
        ) from error
    return recipe


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
