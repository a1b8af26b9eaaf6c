"""Skeletons: names and order of joints, bones and left/right pairs."""

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

H36M17_JOINTS = (
    *("pelvis", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"),
    *("spine", "thorax", "jaw", "head", "left_shoulder", "left_elbow", "left_wrist"),
    *("right_shoulder", "right_elbow", "right_wrist"),
)
"""Human3.6M's 17 joints in the order of the data set; others call the jaw "Neck/Nose"."""

MPII16_JOINTS = (
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis"),
    *("thorax", "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder"),
    *("left_shoulder", "left_elbow", "left_wrist"),
)
"""MPII's 16 joints; "thorax" is between the shoulders."""

COCO17_JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
    *COCO13_JOINTS[1:],
)
"""The 17 joints of COCO."""

OPENPOSE18_JOINTS = (
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist"),
    *("left_shoulder", "left_elbow", "left_wrist", "right_hip", "right_knee", "right_ankle"),
    *("left_hip", "left_knee", "left_ankle", "right_eye", "left_eye", "right_ear", "left_ear"),
)
"""The 18 joints that OpenPose finds with its COCO model."""

OPENPOSE25_JOINTS = (
    *OPENPOSE18_JOINTS[:8],
    "pelvis",
    *OPENPOSE18_JOINTS[8:],
    *("left_big_toe", "left_small_toe", "left_heel"),
    *("right_big_toe", "right_small_toe", "right_heel"),
)
"""The 25 joints of OpenPose's BODY_25."""

SMPL24_JOINTS = (
    *("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2"),
    *("left_ankle", "right_ankle", "spine3", "left_foot", "right_foot", "neck"),
    *("left_collar", "right_collar", "head", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand"),
)
"""The skeleton of SMPL; the first 22 are also those of SMPL+H and SMPL-X."""

SMPL_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
"""The joint next to each of SMPL's 24 on the way to the pelvis; -1 for the pelvis itself."""

LSP14_JOINTS = (
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle"),
    *("right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist"),
    *("neck", "head_top"),
)
"""Leeds Sports Pose."""

J24_JOINTS = (
    *LSP14_JOINTS,
    *("pelvis", "thorax", "spine", "jaw", "head"),
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
)
"""SPIN's 24 joints that come with data sets rather than with OpenPose, annotated in the files of
SPIN, ProHMR and POCO: LSP's 14, MPII's pelvis and thorax, Human3.6M's spine, jaw and head, five of
the face."""

MPI_INF_3DHP17_JOINTS = (
    *("head_top", "neck", "right_shoulder", "right_elbow", "right_wrist"),
    *("left_shoulder", "left_elbow", "left_wrist", "right_hip", "right_knee", "right_ankle"),
    *("left_hip", "left_knee", "left_ankle", "pelvis", "spine", "head"),
)
"""The 17 joints of MPI-INF-3DHP's test set."""

MPI_INF_3DHP28_JOINTS = (
    *("spine3", "spine4", "spine2", "spine", "pelvis", "neck", "head", "head_top"),
    *("left_clavicle", "left_shoulder", "left_elbow", "left_wrist", "left_hand"),
    *("right_clavicle", "right_shoulder", "right_elbow", "right_wrist", "right_hand"),
    *("left_hip", "left_knee", "left_ankle", "left_foot", "left_toe"),
    *("right_hip", "right_knee", "right_ankle", "right_foot", "right_toe"),
)
"""The 28 joints of MPI-INF-3DHP's training set."""
