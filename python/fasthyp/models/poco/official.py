"""Checkpoints of POCO's code (``saidwivedi/POCO``): names, shapes and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasthyp.flows.realnvp import realnvp_masks
from fasthyp.models._official import Checkpoint, official_state, renamed
from fasthyp.models._pretrained import load_exactly
from fasthyp.models.flow_model import PosedBody
from fasthyp.models.poco.heads import BOX_INFO, PARTS

if TYPE_CHECKING:
    from fasthyp.models.poco.model import POCO

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
    checkpoint: Checkpoint,
    body: PosedBody | None,
    backbone: nn.Module | None,
    changes: Mapping[str, Any],
) -> POCO:
    """See :meth:`fasthyp.models.POCO.from_official`."""
    state, source = official_state(checkpoint)
    state = _inside(state, source)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_LEFT_OUT) or (backbone is None and key.startswith("backbone.")):
            continue
        tensors[_renamed(key, state, source)] = value
    if "head.pose" in tensors:  # a LocallyConnected2d of 24 places
        tensors["head.pose"] = tensors["head.pose"][0, :, :, :, 0, 0].permute(2, 0, 1)
    settings = {**_settings(tensors, source), **changes}
    kind = settings.pop("head")
    make = cls.Config.official_pare if kind == "pare" else cls.Config.official_cliff
    model = cls(make(head=kind, **settings), body=body, backbone=backbone)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("body.")}
    load_exactly(model, tensors, source, own)
    return model.eval()


def _inside(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The model's tensors of a state dict in which ``model.`` may stand in front of them."""
    if not any(name.startswith("model.") for name in state):
        return dict(state)
    return renamed(state, {"model.": ""}, _BESIDE_MODEL, source)


def _renamed(key: str, state: Mapping[str, Tensor], source: str) -> str:
    layer = re.match(r"uncert_head\.uncert_fc(\d+)\.(weight|bias)$", key)
    if layer:
        number, what = int(layer[1]), layer[2]
        layers = sum(bool(re.match(r"uncert_head\.uncert_fc\d+\.weight$", k)) for k in state)
        if layers > 2 or (layers == 2 and "uncert_head.uncert_fc_featNet.weight" in state):
            raise ValueError(
                f"{source}: a scale network of {layers} layers: expected one hidden layer"
            )
        return f"scale.{'output' if number == layers else 'feature_net'}.{what}"
    for pattern, target in _RENAMED:
        if re.match(pattern, key):
            return re.sub(pattern, target, key)
    raise ValueError(f"{source}: unknown tensor {key!r}")


def _settings(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What the shapes say of the configuration."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise ValueError(f"{source}: tensor {key!r} is missing")
        return tuple(tensors[key].shape)

    settings: dict[str, Any] = {"betas": shape("head.init_shape")[1]}
    if "head.pose" in tensors:
        channels, features = shape("head.part_branch.0.weight")[:2]
        settings |= {"head": "pare", "features": features, "part_channels": channels}
        settings["shape_channels"] = shape("head.shape_features.weight")[0]
        width = PARTS * channels
    else:
        settings["hidden"], inputs = shape("head.fc1.weight")
        seen = inputs - 6 * PARTS - settings["betas"] - 3
        width = _feature_width(tensors, seen, source)
        settings |= {"head": "cliff" if seen == width + BOX_INFO else "hmr", "features": width}
    settings["scale_hidden"], first = shape("scale.feature_net.weight")
    if "scale.pose_net.weight" in tensors:
        settings["scale_input"] = "feat-pose-net"
    else:
        settings["scale_input"] = "feat" if first == width else "feat-pose"
    settings["sigma_dim"] = shape("scale.output.weight")[0] // PARTS
    masks = tensors.get("density.flow.mask")
    if masks is None or masks.ndim != 2 or len(masks) % 2 or not len(masks):
        raise ValueError(f"{source}: tensor 'density.flow.mask' is missing or not (2 L, D)")
    settings |= {"flow_layers": len(masks) // 2, "flow_dim": masks.shape[1]}
    settings["flow_hidden"] = shape("density.flow.s.0.0.weight")[0]
    kinds = [
        kind
        for kind in ("alter", "new", "old")
        if masks.float().equal(realnvp_masks(kind, masks.shape[1], len(masks) // 2))
    ]
    if not kinds:
        raise ValueError(f"{source}: tensor 'density.flow.mask': no masks of POCO's")
    settings["flow_masks"] = kinds[0]
    has_condition = "density.condition.weight" in tensors
    settings["condition"] = shape("density.condition.weight")[0] if has_condition else 0
    return settings


def _feature_width(tensors: Mapping[str, Tensor], seen: int, source: str) -> int:
    """C, of a head that sees C or C + 3 numbers: what the other networks see decides."""
    for key in ("density.condition.weight", "scale.feature_net.weight"):
        if key in tensors:
            inputs = tensors[key].shape[1]
            for width in (inputs, inputs - 9 * PARTS):
                if width in (seen, seen - BOX_INFO):
                    return width
    raise ValueError(f"{source}: tensor 'head.fc1.weight': fits no width of the image features")
