#!/usr/bin/env python3
# ruff: noqa: E501, RUF005  (kept as it was when the golden data was made with it)
"""Write a synthetic body model in the file layout of the original SMPL model files.

The numbers have nothing to do with the real SMPL model: they come from an integer hash, so the file can be
produced anywhere without a licence, bit for bit (no random generator, no transcendental function; every
number is a small integer divided by a power of two, hence exact in float32 and float64).

    python make_synthetic_smpl.py OUTDIR [--salt N] [--no-pkl] [--no-npz]

writes OUTDIR/SMPL_NEUTRAL.pkl  (pickle protocol 2, scipy csc J_regressor, float64 arrays; about 40 MB) and
       OUTDIR/SMPL_NEUTRAL.npz  (the same arrays, dense J_regressor, compressed),
and prints a sha256 for every array.
"""

import argparse
import hashlib
import os
import pickle

import numpy as np

V, J, NB = 6890, 24, 10
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]
# rest joints in 1/128 m (x left, y up, z front)
REST = [
    [0, -28, 2],
    [8, -40, 2],
    [-8, -40, 2],
    [0, -14, 0],
    [12, -88, 1],
    [-12, -88, 1],
    [0, 4, 3],
    [11, -140, -3],
    [-11, -140, -3],
    [0, 10, 5],
    [14, -147, 12],
    [-14, -147, 12],
    [0, 38, -1],
    [10, 26, 0],
    [-10, 26, 0],
    [0, 50, 6],
    [22, 28, -2],
    [-22, 28, -2],
    [55, 26, -4],
    [-55, 26, -4],
    [87, 27, -5],
    [-87, 27, -5],
    [98, 26, -6],
    [-98, 26, -6],
]
M64 = np.uint64(0xFFFFFFFFFFFFFFFF)


def hash_u32(n, salt, stream):
    """n pseudo-random uint32 (splitmix64 finaliser of a counter)"""
    with np.errstate(over="ignore"):
        z = np.arange(n, dtype=np.uint64) + np.uint64(
            (salt * 1000003 + stream * 7919 + 12345) & 0xFFFFFFFF
        ) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(32)).astype(np.int64)


def ints(shape, lo, hi, salt, stream):
    """integers in [lo, hi]"""
    n = int(np.prod(shape))
    return (lo + hash_u32(n, salt, stream) % (hi - lo + 1)).reshape(shape)


def build(salt=0):
    rest = np.array(REST, dtype=np.int64) * 8  # 1/1024 m
    prim = (np.arange(V, dtype=np.int64) * J) // V  # primary joint of every vertex
    off = ints((V, 3), -64, 64, salt, 1)
    v_template = (rest[prim] + off) / 1024.0
    # weights: primary, its parent, one child (if any), one hashed joint; multiples of 1/64, at most 4 non-zeros
    par = np.array([max(p, 0) for p in PARENTS])
    child = np.array([next((c for c in range(J) if PARENTS[c] == j), j) for j in range(J)])
    q = ints((V, 3), 0, 10, salt, 2)
    q[:, 2] = np.where(ints((V,), 0, 3, salt, 3) == 0, ints((V,), 1, 4, salt, 4), 0)
    w = np.zeros((V, J), dtype=np.int64)
    rows = np.arange(V)
    np.add.at(w, (rows, prim), 64 - q.sum(1))
    np.add.at(w, (rows, par[prim]), q[:, 0])
    np.add.at(w, (rows, child[prim]), q[:, 1])
    np.add.at(w, (rows, ints((V,), 0, J - 1, salt, 5)), q[:, 2])
    weights = w / 64.0
    shapedirs = ints((V, 3, NB), -15, 15, salt, 6) / 4096.0
    # pose blend shapes: only the 9 numbers of the primary joint and of its parent are non-zero (root has none)
    posedirs = np.zeros((V, 3, 9 * (J - 1)))
    val = ints((V, 3, 18), -7, 7, salt, 7) / 2048.0
    for j in range(J):
        r = np.where(prim == j)[0]
        if j > 0:
            posedirs[np.ix_(r, range(3), range(9 * (j - 1), 9 * j))] = val[r][:, :, :9]
        if PARENTS[j] > 0:
            p = PARENTS[j]
            posedirs[np.ix_(r, range(3), range(9 * (p - 1), 9 * p))] = val[r][:, :, 9:]
    # joint regressor: mean of 16 vertices of the joint
    jr = np.zeros((J, V))
    for j in range(J):
        r = np.where(prim == j)[0]
        pick = r[(np.arange(16) * 17 + 3 + salt) % len(r)]
        np.add.at(jr, (j, pick), 1.0 / 16)
    i = np.arange(V - 2)
    f = np.empty((2 * (V - 2), 3), dtype=np.uint32)
    f[0::2] = np.stack([i, i + 1, i + 2], 1)
    f[1::2] = np.stack([i, i + 2, i + 1], 1)
    kintree = np.array([[2**32 - 1] + PARENTS[1:], list(range(J))], dtype=np.uint32)
    return {
        "v_template": v_template,
        "shapedirs": shapedirs,
        "posedirs": posedirs,
        "J_regressor": jr,
        "kintree_table": kintree,
        "weights": weights,
        "f": f,
        "J": jr @ v_template,
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def digests(d):
    return {
        k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest()
        for k, v in d.items()
        if isinstance(v, np.ndarray)
    }


def write(outdir, salt=0, pkl=True, npz=True):
    os.makedirs(outdir, exist_ok=True)
    d = build(salt)
    if npz:
        np.savez_compressed(os.path.join(outdir, "SMPL_NEUTRAL.npz"), **d)
    if pkl:
        import scipy.sparse

        e = dict(d, J_regressor=scipy.sparse.csc_matrix(d["J_regressor"]))
        with open(os.path.join(outdir, "SMPL_NEUTRAL.pkl"), "wb") as fh:
            pickle.dump(e, fh, protocol=2)
    return d


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("outdir")
    ap.add_argument("--salt", type=int, default=0)
    ap.add_argument("--no-pkl", action="store_true")
    ap.add_argument("--no-npz", action="store_true")
    a = ap.parse_args()
    d = write(a.outdir, a.salt, not a.no_pkl, not a.no_npz)
    for k, v in digests(d).items():
        print(k, d[k].shape, d[k].dtype, v)
