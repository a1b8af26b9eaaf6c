"""What the published systems' models share: a configuration, and files to keep them in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fasthyp._files import replacing

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"

M = TypeVar("M", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A module that is made from a configuration alone, and saved with it.

    A subclass names its frozen dataclass of plain JSON values (numbers, strings, booleans, tuples
    of them) as ``Config``; its ``__init__`` may take modules beside the configuration (a backbone,
    a body), which :meth:`from_pretrained` passes on.

    Args:
        config: a ``Config``, or None for its defaults.
        changes: settings that differ from it.

    Attributes:
        config: what the module was made from.
    """

    Config: ClassVar[Any]

    def __init__(self, config: Any = None, **changes: Any) -> None:
        super().__init__()
        if config is None:
            config = self.Config()
        if not isinstance(config, self.Config):
            expected = self.Config.__qualname__
            raise TypeError(f"config: expected {expected}, got {type(config).__name__}")
        unknown = sorted(changes.keys() - {field.name for field in fields(config)})
        if unknown:
            raise TypeError(f"{type(self).__name__}: unknown setting {unknown[0]!r}")
        self.config = replace(config, **changes)

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into a folder, made where missing.

        Parameters and buffers are written as they are; those that are not the model's own (of a
        body, say) are left out by :meth:`saved_state`. Each file is written under a temporary name
        and renamed.

        Returns:
            The folder.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.saved_state().items()}
        config = {"model": type(self).__name__, **asdict(self.config)}
        for name, content in (
            (WEIGHTS_NAME, save(tensors)),
            (CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode()),
        ):
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        return folder

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        **modules: Any,
    ) -> M:
        """The model that :meth:`save_pretrained` wrote into a folder, in eval mode.

        Args:
            path: the folder.
            device: where to put it.
            modules: what the class takes beside its configuration (a backbone, a body).

        Raises:
            ValueError: a file is missing or unreadable, is another model's, has an unknown
                setting, or a tensor is missing, unknown or of the wrong shape; names it.
        """
        folder = Path(path)
        values = read_config(folder)
        name = values.pop("model", None)
        if name != cls.__name__:
            raise ValueError(f"{folder / CONFIG_NAME}: expected a {cls.__name__}, got {name!r}")
        try:
            model = cls(config_from(cls.Config, values), **modules)
        except (TypeError, ValueError, RuntimeError) as error:  # the last of sizes below zero
            raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
        model.load_weights(folder)
        return model.to(device).eval()

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take the weights that :meth:`save_pretrained` wrote into a folder.

        Raises:
            ValueError: the file is missing or unreadable, or a tensor is missing, unknown or of
                the wrong shape; names it.
        """
        weights = Path(path) / WEIGHTS_NAME
        try:
            tensors = load_file(str(weights))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{weights}: not a readable safetensors file: {error}") from error
        load_exactly(self, tensors, str(weights), self.saved_state())

    def saved_state(self) -> dict[str, Tensor]:
        """The part of the state dict that is saved: all of it, unless a subclass says otherwise."""
        return self.state_dict()


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a folder; errors as :func:`read_json`."""
    return read_json(folder / CONFIG_NAME)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, or is no object.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable configuration: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def config_from(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from parsed JSON: lists become tuples, nested objects nested dataclasses.

    Raises:
        ValueError: an unknown setting, or one of another type; names it.
    """
    known = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind)
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting {name}")
        if isinstance(value, dict):
            factory = known[name].default_factory
            if not (isinstance(factory, type) and is_dataclass(factory)):
                raise ValueError(f"{name}: expected no object, got {value!r}")
            value = config_from(factory, value)
        value = _tuples(value)
        if not _is_a(value, hints[name]):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            expected = str(hints[name]) if get_origin(hints[name]) else expected
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        settings[name] = value
    return kind(**settings)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the type that a field of a configuration is declared with."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_is_a(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_is_a, value, inner))
    if hint in (int, float):
        number = (int,) if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def load_exactly(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    expected: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy tensors into a module whose names and shapes they must match one for one.

    Args:
        model: the module.
        tensors: by the names of its state dict.
        source: what the messages call them.
        expected: the part of the state dict that must be given; all of it unless told.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape; names it.
    """
    expected = model.state_dict() if expected is None else expected
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{source}: tensor {name!r} is missing")
        if name not in expected:
            raise ValueError(f"{source}: unknown tensor {name!r}")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{source}: tensor {name!r}: expected {tuple(expected[name].shape)}, "
                f"got {tuple(tensors[name].shape)}"
            )
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in tensors.items()}, strict=False)
