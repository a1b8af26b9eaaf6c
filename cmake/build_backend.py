"""PEP 517 backend: scikit-build-core, plus a CUDA compiler from PyPI where the machine has none.

The compiler goes into the isolated build environment only. Nothing is added when an nvcc is found,
when FASTHYP_CUDA is off, or on a platform for which NVIDIA publishes no compiler.
"""

import os
import platform
import shutil
import sys

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403

# One metapackage pins compiler, headers and runtime together; pinning nvcc alone lets them drift
# to a newer release, whose PTX the older ptxas refuses.
_TOOLKIT = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"


def _toolkit_requirement() -> list[str]:
    if os.environ.get("FASTHYP_CUDA", "auto").strip().lower() in ("0", "off", "false", "no"):
        return []
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "aarch64"):
        return []
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    for home in filter(None, homes):
        found = found or shutil.which("nvcc", path=os.path.join(home, "bin"))
    return [] if found else [_TOOLKIT]


def get_requires_for_build_wheel(config_settings=None):
    return [*_backend.get_requires_for_build_wheel(config_settings), *_toolkit_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*_backend.get_requires_for_build_editable(config_settings), *_toolkit_requirement()]
