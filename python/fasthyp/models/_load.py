"""A model of whatever class from its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fasthyp.models._pretrained import CONFIG_NAME, PretrainedModel, read_config
from fasthyp.models.hypotheses import Hypothesiser

BUNDLED = "lifting"
"""The name of the model that comes with the package."""


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", **modules: Any
) -> Hypothesiser:
    """The model that ``save_pretrained`` wrote into a folder, in eval mode.

    Its ``config.json`` names the class, one of :mod:`fasthyp.models`; only that class's module is
    imported.

    Args:
        path: the folder, or that of a training run; ``"lifting"`` for the bundled
            :class:`LiftingFlow`, or the folder or ``.safetensors`` file of another.
        device: where to put it.
        modules: what the class takes beside its configuration (a backbone, a body).

    Raises:
        ValueError: the folder holds no model, or a damaged one, or the device is not there; says
            what is wrong.
    """
    import fasthyp.models as models

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but PyTorch finds no CUDA device")
    folder = Path(path)
    if (folder / "model" / CONFIG_NAME).is_file():  # of a training run
        folder = folder / "model"
    lifting = folder.suffix == ".safetensors" or (folder / "lifting.safetensors").is_file()
    if str(path) == BUNDLED or lifting:
        if modules:
            raise ValueError(f"{path}: a LiftingFlow takes no {sorted(modules)[0]}")
        return models.LiftingFlow.from_pretrained(folder if lifting else None).to(device)
    name = read_config(folder).get("model")
    known = getattr(models, name, None) if name in models.__all__ else None
    if not (isinstance(known, type) and issubclass(known, PretrainedModel)):
        raise ValueError(f"{folder / CONFIG_NAME}: expected the name of a model, got {name!r}")
    return known.from_pretrained(folder, device, **modules)  # type: ignore[return-value]
