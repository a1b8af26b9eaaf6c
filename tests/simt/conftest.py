from __future__ import annotations

from pathlib import Path

import pytest

from tests.simt.tools import HERE, build, build_kernels


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is built."""
    return tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="session")
def emulation(programs: Path) -> Path:
    return build(programs / "simt.o", HERE / "simt.cpp")


@pytest.fixture(scope="session")
def coupling(programs: Path, emulation: Path) -> Path:
    """Runs a flow with the CUDA kernels."""
    names = ("coupling/cuda.cu", "coupling/cuda_product.cu", "coupling/cuda_rows.cu")
    return build_kernels(programs / "coupling", emulation, *names)
