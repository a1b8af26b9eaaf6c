"""The 13 COCO body joints: names, order, bones and left/right pairs. The tree of SMPL."""

from __future__ import annotations

COCO13_JOINTS = (
    "nose",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)

COCO17_TO_COCO13 = (0, *range(5, 17))
"""Which of the 17 COCO joints (nose, eyes, ears, ...) are the 13, in order."""

COCO13_MIRROR = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11)
"""``pose[..., COCO13_MIRROR, :]`` exchanges left and right."""

COCO13_BONES = (
    (0, 1),
    (0, 2),
    (1, 2),
    (1, 3),
    (3, 5),
    (2, 4),
    (4, 6),
    (1, 7),
    (2, 8),
    (7, 8),
    (7, 9),
    (9, 11),
    (8, 10),
    (10, 12),
)
"""Joint pairs to draw as a stick figure."""

COCO13_PARENTS = (-1, 0, 0, 1, 2, 3, 4, 1, 2, 7, 8, 9, 10)
"""The joint next to each one on the way to the nose; -1 for the nose itself."""

SMPL_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
"""The joint next to each of SMPL's 24 on the way to the pelvis; -1 for the pelvis itself."""
