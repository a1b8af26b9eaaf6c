"""fasthyp: probabilistic human pose estimation, fast."""

from fasthyp import _C

__version__ = _C.version
