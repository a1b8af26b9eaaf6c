"""The code of docs/migrate.md runs, section by section, on smaller networks; links resolve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.body import synthetic_models
from tests.flows import nflows_stand_ins as nflows

DOCS = Path(__file__).resolve().parent.parent / "docs"
SMALL = {"1024": "16", "2048": "6", "144": "12"}  # widths


def sections() -> dict[str, list[str]]:
    """The blocks of code under each heading that has some."""
    found = {}
    for part in re.split(r"^## ", (DOCS / "migrate.md").read_text(), flags=re.M)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", part, flags=re.M | re.S)
        if blocks:
            found[part.splitlines()[0]] = blocks
    return found


def nflows_flow() -> torch.nn.Module:
    def net(inputs: int, outputs: int) -> torch.nn.Module:
        return nflows.ResidualNet(inputs, outputs, 16, 6, 2)

    mask = torch.tensor([1.0, -1.0] * 3)
    layers = [nflows.LULinear(6), nflows.AdditiveCouplingTransform(mask, net)]
    return nflows.Flow(nflows.CompositeTransform(layers), nflows.StandardNormal([6])).eval()


@pytest.mark.parametrize("heading", sections())
def test_code_runs(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    if heading == "From nflows":
        names |= {"flow": nflows_flow(), "context": torch.randn(2, 6)}
    if heading == "From smplx":
        arrays = synthetic_models.model(vertices=6890)
        synthetic_models.write_pickle(tmp_path / "SMPL_NEUTRAL.pkl", arrays)
    if heading.startswith("What is not accelerated"):
        import fasthyp

        names |= {"fasthyp": fasthyp, "torch": torch, "body": nflows_flow()}
    for block in sections()[heading]:
        for large, small in SMALL.items():
            block = re.sub(rf"\b{large}\b", small, block)
        exec(compile(block, f"docs/migrate.md, {heading}", "exec"), names)


def test_every_section_of_code_is_found() -> None:
    assert [len(blocks) for blocks in sections().values()] == [5, 2, 3, 1]


def test_links_resolve() -> None:
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    listed = set(re.findall(r"\(([a-z_/]+\.md)\)", (DOCS / "index.md").read_text()))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert listed == there
