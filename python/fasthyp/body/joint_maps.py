"""Joint sets of the data sets and models, and index maps between them.

``points[..., MAP, :]`` picks the joints of the second set from the first.
"""

from __future__ import annotations

from fasthyp.skeleton import (
    COCO13_JOINTS,
    COCO17_JOINTS,
    H36M17_JOINTS,
    J24_JOINTS,
    LSP14_JOINTS,
    SMPL24_JOINTS,
)

SMPL45_JOINTS = (
    *SMPL24_JOINTS,
    *("nose", "right_eye", "left_eye", "right_ear", "left_ear"),
    *("left_big_toe", "left_small_toe", "left_heel"),
    *("right_big_toe", "right_small_toe", "right_heel"),
    *(
        f"{side}_{finger}"
        for side in ("left", "right")
        for finger in ("thumb", "index", "middle", "ring", "pinky")
    ),
)
"""The joints of a call of :class:`~fasthyp.body.SMPL`."""

J19_JOINTS = (*LSP14_JOINTS, "nose", "left_eye", "right_eye", "left_ear", "right_ear")
"""HMR's 19 "cocoplus" joints, of its SMPL-to-J19 regressor: LSP's and COCO's face."""

SMPL45_TO_COCO17 = tuple(SMPL45_JOINTS.index(name) for name in COCO17_JOINTS)
SMPL45_TO_COCO13 = tuple(SMPL45_JOINTS.index(name) for name in COCO13_JOINTS)
"""The hips are those of SMPL's skeleton, which lie lower and further in than COCO's."""

H36M17_TO_LSP14 = tuple(
    H36M17_JOINTS.index({"neck": "thorax", "head_top": "head"}.get(name, name))
    for name in LSP14_JOINTS
)
"""From joints in the order of the data set, right leg first."""

H36M_REGRESSOR_TO_LSP14 = (6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10)
"""From what HMR's and SPIN's ``J_regressor_h36m.npy`` gives, whose first leg is the left one."""

J24_TO_J14 = (*range(13), 18)
"""To LSP's joints, with Human3.6M's head in place of the top of the head (SPIN's evaluation)."""

J24_TO_J19 = (*J24_TO_J14, 19, 20, 21, 22, 23)
J24_TO_COCO17 = tuple(J24_JOINTS.index(name) for name in COCO17_JOINTS)
J19_TO_COCO17 = tuple(J19_JOINTS.index(name) for name in COCO17_JOINTS)
J19_TO_COCO13 = tuple(J19_JOINTS.index(name) for name in COCO13_JOINTS)
