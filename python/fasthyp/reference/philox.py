"""Philox 4x32-10 in NumPy."""

from __future__ import annotations

import numpy as np


def philox4x32(counter: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Four random words from the four of each counter (all uint64, below 2^32) and the seed.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * counter[0]
        p1 = np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (p1 >> shift) ^ counter[1] ^ np.uint64(key[0]),
            p1 & mask,
            (p0 >> shift) ^ counter[3] ^ np.uint64(key[1]),
            p0 & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter
