"""The build's front door and what ends up in the package."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import pytest

import fasthyp
from fasthyp import _C

ROOT = Path(__file__).resolve().parent.parent


def build_backend() -> ModuleType:
    pytest.importorskip("scikit_build_core", reason="the build requirement is not installed here")
    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "cmake" / "build_backend.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linux machine on which no CUDA compiler can be found."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "FASTHYP_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.usefixtures("no_nvcc")
def test_compiler_comes_from_pypi_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build_backend()
    assert backend._toolkit_requirement() == [backend._TOOLKIT]
    assert backend._TOOLKIT in backend.get_requires_for_build_wheel()
    for off in ("0", "off", "FALSE"):
        monkeypatch.setenv("FASTHYP_CUDA", off)
        assert backend._toolkit_requirement() == []
    monkeypatch.setenv("FASTHYP_CUDA", "1")
    assert backend._toolkit_requirement() == [backend._TOOLKIT]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert backend._toolkit_requirement() == []


@pytest.mark.parametrize("place", ["CUDACXX", "PATH", "CUDA_HOME"])
def test_own_compiler_is_used(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "FASTHYP_CUDA"):
        monkeypatch.delenv(name, raising=False)
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    value = {"CUDACXX": compiler, "PATH": compiler.parent, "CUDA_HOME": tmp_path}[place]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(place, str(value))
    assert build_backend()._toolkit_requirement() == []


def test_one_version_everywhere() -> None:
    project = re.search(r'^version = "([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    cmake = re.search(r"project\(fasthyp VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert project is not None
    assert cmake is not None
    assert project[1] == cmake[1] == _C.version == fasthyp.__version__


def test_package_holds_its_data() -> None:
    files = resources.files("fasthyp")
    page = [f"viz/viewer.{suffix}" for suffix in ("html", "css", "js")]
    data = ["models/weights/lifting.safetensors", "data/astronaut_heatmaps.npz"]
    for name in ("py.typed", *data, *page):
        assert (files / name).is_file(), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF dependencies with ldd")
def test_extension_links_neither_torch_nor_cuda_nor_openmp() -> None:
    run = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True)
    linked = [line.split()[0] for line in run.stdout.splitlines()]
    assert any(name.startswith("libstdc++") for name in linked)
    for library in ("torch", "c10", "cuda", "gomp", "iomp"):
        assert not [name for name in linked if library in name]


def test_every_public_name_resolves() -> None:
    for name in fasthyp.__all__:
        assert getattr(fasthyp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'accelerated'"):
        _ = fasthyp.accelerated


def test_core_knows_no_framework() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        includes = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        if path.name != "bindings.cpp":
            assert not [name for name in includes if "pybind11" in name or "Python.h" in name], path


def test_console_script_is_installed() -> None:
    if "fasthyp" not in {dist.metadata["Name"] for dist in metadata.distributions()}:
        pytest.skip("fasthyp runs from its source folder here, not from an installation")
    script = Path(sys.executable).parent / ("fasthyp.exe" if os.name == "nt" else "fasthyp")
    run = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "sample" in run.stdout
    assert "demo" in run.stdout
