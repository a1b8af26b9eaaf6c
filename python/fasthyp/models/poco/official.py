"""Checkpoints of POCO's code (``saidwivedi/POCO``): names, shapes and settings."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasthyp.flows.realnvp import realnvp_masks
from fasthyp.models._pretrained import load_exactly
from fasthyp.models.poco.heads import BOX_INFO, PARTS

if TYPE_CHECKING:
    from fasthyp.models.poco.model import POCO, PosedBody

_RENAMED = (
    (r"head\.keypoint_deconv_layers\.", "head.part_branch."),
    (r"head\.smpl_deconv_layers\.", "head.body_branch."),
    (r"head\.keypoint_final_layer\.", "head.part_maps."),
    (r"head\.smpl_final_layer\.", "head.shape_features."),
    (r"head\.shape_mlp\.", "head.shape."),
    (r"head\.cam_mlp\.", "head.cam."),
    (r"head\.pose_mlp\.weight$", "head.pose"),
    (r"uncert_head\.uncert_fc_poseNet\.", "scale.pose_net."),
    (r"uncert_head\.uncert_fc_featNet\.", "scale.feature_net."),
    (r"flow_head\.cond_layer\.", "density.condition."),
    (r"flow_head\.flow\.", "density.flow."),
    (r"head\.", "head."),
    (r"backbone\.", "backbone."),
)
_LEFT_OUT = ("smpl.", "head.temperature")
"""The body, which is the user's, and a constant of PARE that nothing reads."""
_BESIDE_MODEL = ("smpl.", "smpl_native.", "J_regressor", "loss_fn.")
"""What Lightning's checkpoints hold beside ``model.``."""


def load(
    cls: type[POCO],
    source: str | PathLike[str] | Mapping[str, Any],
    body: PosedBody | None,
    backbone: nn.Module | None,
    changes: Mapping[str, Any],
) -> POCO:
    """See :meth:`fasthyp.models.POCO.from_official`."""
    name = "state dict" if isinstance(source, Mapping) else str(source)
    state = _tensors(source, name)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_LEFT_OUT) or (backbone is None and key.startswith("backbone.")):
            continue
        tensors[_renamed(key, state, name)] = value
    if "head.pose" in tensors:  # a LocallyConnected2d of 24 places
        tensors["head.pose"] = tensors["head.pose"][0, :, :, :, 0, 0].permute(2, 0, 1)
    settings = {**_settings(cls, tensors, name), **changes}
    kind = settings.pop("head")
    make = cls.Config.official_pare if kind == "pare" else cls.Config.official_cliff
    model = cls(make(head=kind, **settings), body=body, backbone=backbone)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("body.")}
    load_exactly(model, tensors, name, own)
    return model.eval()


def _tensors(source: str | PathLike[str] | Mapping[str, Any], name: str) -> dict[str, Tensor]:
    content: Any = source
    if not isinstance(source, Mapping):
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{name}: not a readable checkpoint ({error})") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: expected a dict of tensors, got {type(content).__name__}")
    state = {}
    inside = any(str(key).startswith("model.") for key in content)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name}: {key}: expected a tensor, got {type(value).__name__}")
        if inside and not key.startswith("model."):
            if not key.startswith(_BESIDE_MODEL):
                raise ValueError(f"{name}: unknown tensor {key!r}")
            continue
        state[key.removeprefix("model.") if inside else key] = value
    return state


def _renamed(key: str, state: Mapping[str, Tensor], name: str) -> str:
    layer = re.match(r"uncert_head\.uncert_fc(\d+)\.(weight|bias)$", key)
    if layer:
        number, what = int(layer[1]), layer[2]
        layers = sum(bool(re.match(r"uncert_head\.uncert_fc\d+\.weight$", k)) for k in state)
        if layers > 2 or (layers == 2 and "uncert_head.uncert_fc_featNet.weight" in state):
            raise ValueError(
                f"{name}: a scale network of {layers} layers: expected one hidden layer"
            )
        return f"scale.{'output' if number == layers else 'feature_net'}.{what}"
    for pattern, target in _RENAMED:
        if re.match(pattern, key):
            return re.sub(pattern, target, key)
    raise ValueError(f"{name}: unknown tensor {key!r}")


def _settings(cls: type[POCO], tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What the shapes say of the configuration."""

    def shape(key: str) -> torch.Size:
        if key not in tensors:
            raise ValueError(f"{name}: tensor {key!r} is missing")
        return tensors[key].shape

    settings: dict[str, Any] = {"betas": shape("head.init_shape")[1]}
    if "head.pose" in tensors:
        channels, features = shape("head.part_branch.0.weight")[:2]
        settings |= {"head": "pare", "features": features, "part_channels": channels}
        settings["shape_channels"] = shape("head.shape_features.weight")[0]
        width = PARTS * channels
    else:
        settings["hidden"], inputs = shape("head.fc1.weight")
        seen = inputs - 6 * PARTS - settings["betas"] - 3
        width = _feature_width(tensors, seen, name)
        settings |= {"head": "cliff" if seen == width + BOX_INFO else "hmr", "features": width}
    settings["scale_hidden"], first = shape("scale.feature_net.weight")
    if "scale.pose_net.weight" in tensors:
        settings["scale_input"] = "feat-pose-net"
    else:
        settings["scale_input"] = "feat" if first == width else "feat-pose"
    settings["sigma_dim"] = shape("scale.output.weight")[0] // PARTS
    masks = tensors.get("density.flow.mask")
    if masks is None or masks.ndim != 2 or len(masks) % 2 or not len(masks):
        raise ValueError(f"{name}: tensor 'density.flow.mask' is missing or not (2 L, D)")
    settings |= {"flow_layers": len(masks) // 2, "flow_dim": masks.shape[1]}
    settings["flow_hidden"] = shape("density.flow.s.0.0.weight")[0]
    kinds = [
        kind
        for kind in ("alter", "new", "old")
        if masks.float().equal(realnvp_masks(kind, masks.shape[1], len(masks) // 2))
    ]
    if not kinds:
        raise ValueError(f"{name}: tensor 'density.flow.mask': no masks of POCO's")
    settings["flow_masks"] = kinds[0]
    has_condition = "density.condition.weight" in tensors
    settings["condition"] = shape("density.condition.weight")[0] if has_condition else 0
    return settings


def _feature_width(tensors: Mapping[str, Tensor], seen: int, name: str) -> int:
    """C, of a head that sees C or C + 3 numbers: what the other networks see decides."""
    for key in ("density.condition.weight", "scale.feature_net.weight"):
        if key in tensors:
            inputs = tensors[key].shape[1]
            for width in (inputs, inputs - 9 * PARTS):
                if width in (seen, seen - BOX_INFO):
                    return width
    raise ValueError(f"{name}: tensor 'head.fc1.weight': fits no width of the image features")
