"""The page of hypotheses: what is in it, what it refuses, and what a browser makes of it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from fasthyp.cli import main
from fasthyp.observations import from_heatmaps
from fasthyp.skeleton import COCO13_BONES, COCO13_JOINTS, SMPL24_JOINTS
from fasthyp.viz import style, write_viewer
from tests.synthetic import people

HOSTILE = "</script><script>alert(1)</script>"
PERSONS, SAMPLES = 3, 40


def example() -> dict[str, np.ndarray]:
    """What ``fasthyp sample`` writes: persons that differ, the ankles the least sure."""
    rng = np.random.default_rng(0)
    mode = 1000 * people(PERSONS)[..., [1, 2, 0]].numpy() * [1, -1, 1]
    sigma = 5.0 * np.arange(1, 14)[:, None] * [0.5, 0.5, 1.0]
    hypotheses = mode[:, None] + sigma * rng.standard_normal((PERSONS, SAMPLES, 13, 3))
    return {
        "hypotheses": hypotheses.astype(np.float32),
        "log_prob": rng.normal(80, 10, (PERSONS, SAMPLES)).astype(np.float32),
        "mode": mode.astype(np.float32),
        "fit_mean": (mode[..., :2] / 60 + 32).astype(np.float32),
        "fit_covariance": np.tile(np.float32([[4, 1], [1, 2]]), (PERSONS, 13, 1, 1)),
    }


def observations() -> Any:
    rng = np.random.default_rng(1)
    maps = rng.random((PERSONS, 13, 16, 12)).astype(np.float32)
    crop = np.zeros((PERSONS, 32, 24, 3), np.uint8)
    crop[:, 4:20, 6:18] = 200
    return from_heatmaps(maps, crop)


class _Scripts(HTMLParser):
    """The text of every script element, as a browser tells them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def content(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_Scripts(path.read_text("utf-8")).texts[0])
    return value


def decoded(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


# --- what is in it


def test_page_holds_the_numbers(tmp_path: Path) -> None:
    given, seen = example(), observations()
    write_viewer(tmp_path / "page.html", **given, observations=seen, first=5)
    page = content(tmp_path / "page.html")
    assert page["joints"] == list(COCO13_JOINTS)
    assert page["bones"] == [list(bone) for bone in COCO13_BONES]
    assert [person["number"] for person in page["persons"]] == [5, 6, 7]
    for p, person in enumerate(page["persons"]):
        poses = given["hypotheses"][p].astype(np.float64)
        codes = decoded(person["poses"], "<u2").reshape(poses.shape).astype(np.float32)
        # in float32, as the page computes
        shown = np.float32(person["low"]) + codes * np.float32(person["step"])
        error = np.ptp(poses, axis=(0, 1)) / 131070 + 4e-7 * np.abs(poses).max()
        assert (np.abs(shown - poses) <= error).all()
        assert error.max() < 0.02  # mm
        np.testing.assert_array_equal(decoded(person["logProb"], "<f4"), given["log_prob"][p])
        np.testing.assert_allclose(person["mode"], given["mode"][p].ravel())
        covariance = np.reshape(person["covariance"], (13, 3, 3))
        expected = [np.cov(poses[:, j].T, bias=True) for j in range(13)]
        np.testing.assert_allclose(covariance, expected, rtol=1e-6, atol=1e-6)
        maps = seen.heatmaps[p].numpy()
        bits = decoded(person["heatmaps"], "u1").reshape(maps.shape)
        peak = np.array(person["peak"])[:, None, None]
        assert (np.abs(bits / 255 * peak - maps) <= peak / 510 * 1.0001).all()
        assert person["picture"]["box"] == [3, 2, 9, 10]  # cells, without the black border
        assert person["fit"][0]["covariance"] == [4, 1, 1, 2]


def test_page_asks_for_nothing_else(tmp_path: Path) -> None:
    write_viewer(tmp_path / "page.html", **example(), observations=observations())
    text = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r"https?:|//cdn|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!data:)", text)
    assert "default-src 'none'" in text
    assert "{{" not in text


def test_texts_cannot_break_out(tmp_path: Path) -> None:
    names = (HOSTILE, *COCO13_JOINTS[1:])
    write_viewer(
        tmp_path / "page.html",
        example()["hypotheses"],
        joint_names=names,
        title=f"{HOSTILE}{{{{script}}}}",
    )
    text = (tmp_path / "page.html").read_text("utf-8")
    scripts = _Scripts(text).texts
    assert len(scripts) == 2
    assert json.loads(scripts[0])["joints"][0] == HOSTILE
    assert "<script>alert" not in text
    assert text.count("use strict") == 1  # a marker in a text is text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    poses = np.zeros((1, 2, 22, 3))  # no extent at all
    write_viewer(tmp_path / "page.html", poses, joint_names=SMPL24_JOINTS[:22])
    page = content(tmp_path / "page.html")
    assert len(page["bones"]) == 21
    assert set(page["persons"][0]) == {"number", "low", "step", "poses", "mean", "covariance"}
    given = example()
    given["fit_mean"][0, 4] = np.nan
    write_viewer(tmp_path / "page.html", **given)
    fit = content(tmp_path / "page.html")["persons"][0]["fit"]
    assert [joint for joint, one in enumerate(fit) if one is None] == [4]
    write_viewer(tmp_path / "page.html", poses[:, :, :2], joint_names=["a", "b"])
    assert content(tmp_path / "page.html")["bones"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hypotheses": np.zeros((40, 13, 3))}, r"hypotheses: expected shape \(P, M, J, 3\), got"),
        ({"hypotheses": np.zeros((3, 0, 13, 3))}, "hypotheses: expected at least one"),
        ({"hypotheses": np.full((3, 40, 13, 3), np.nan)}, "hypotheses: expected finite"),
        ({"hypotheses": np.zeros((3, 40, 13, 3), bool)}, "hypotheses: expected numbers, got bool"),
        ({"joint_names": ["a"]}, "joint_names: expected 13 names, got 1"),
        ({"bones": [(0, 13)]}, r"bones: expected pairs of 0 to 12, got \(0, 13\)"),
        ({"log_prob": np.zeros((3, 41))}, r"log_prob: expected shape \(3, 40\)"),
        ({"mode": np.zeros((3, 12, 3))}, r"mode: expected shape \(3, 13, 3\)"),
        ({"fit_mean": None}, "fit_mean and fit_covariance: expected both"),
        ({"fit_covariance": np.zeros((3, 13, 2))}, "fit_covariance: expected shape"),
        ({"observations": observations().person(0)}, "observations: expected 3 persons, got 1"),
        (
            {"observations": observations(), "joint_names": [*COCO13_JOINTS[1:], "nose"]},
            "observations: expected hypotheses of COCO's 13 joints",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_viewer(tmp_path / "page.html", **{**example(), **change})
    assert not list(tmp_path.iterdir())


# --- the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    np.savez(tmp_path / "out.npz", **example(), joint_names=np.array(COCO13_JOINTS))
    np.savez(tmp_path / "maps.npz", heatmaps=observations().heatmaps.numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["view", "out.npz", "--heatmaps", "maps.npz", "--max-persons", "2"]) == 0
    said = capsys.readouterr().out
    assert "persons 0 to 1 of 3; --max-persons" in said
    page = content(folder / "out.html")
    assert [person["number"] for person in page["persons"]] == [0, 1]
    assert not opened
    arguments = ["view", "out.npz", "-o", "a.html", "--person", "2", "--heatmaps", "maps.npz"]
    assert main([*arguments, "--open"]) == 0
    assert opened == [(folder / "a.html").resolve().as_uri()]
    (person,) = content(folder / "a.html")["persons"]
    assert person["number"] == 2
    np.testing.assert_array_equal(decoded(person["logProb"], "<f4"), example()["log_prob"][2])
    maps = observations().heatmaps[2].numpy()
    np.testing.assert_allclose(person["peak"], maps.max((1, 2)))


def test_command_reads_shards(folder: Path) -> None:
    given = example()
    shards = {"log_prob": given["log_prob"], "joint_names": np.array(COCO13_JOINTS)}
    shards["hypotheses"] = given["hypotheses"]
    (folder / "run").mkdir()
    manifest = {"persons": PERSONS, "shard_size": 2, "num_samples": SAMPLES}
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    for number, part in enumerate((slice(0, 2), slice(2, 3))):
        arrays = {k: v if k == "joint_names" else v[part] for k, v in shards.items()}
        np.savez(folder / "run" / f"shard-{number:06d}.npz", **arrays)
    assert main(["view", "run"]) == 0
    page = content(folder / "run.html")
    assert page["hypotheses"] == SAMPLES - 1  # the first is the mode
    person = page["persons"][2]
    np.testing.assert_allclose(person["mode"], given["hypotheses"][2, 0].ravel())
    np.testing.assert_array_equal(decoded(person["logProb"], "<f4"), given["log_prob"][2, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.npz"], "none.npz: no such file or folder"),
        (["out.npz", "-o", "out.npz"], "out.npz: expected another file"),
        (["out.npz", "--person", "3"], "--person: expected 0 to 2, got 3"),
        (["out.npz", "--max-persons", "0"], "--max-persons"),
        (["out.npz", "--heatmaps", "one.npz"], "one.npz: expected the 3 persons of out.npz, got 1"),
        (["out.npz", "--heatmaps", "out.npz"], "expected an array heatmaps"),
        (["out.npz", "-o", "none/a.html"], "none/a.html: cannot be written"),
        (["maps.npz"], "expected an array 'hypotheses'"),
        (["text.npz"], "text.npz"),
        (["short.npz"], "short.npz: log_prob: expected 3 persons"),
        (["flat.npz"], "flat.npz: hypotheses: expected shape"),
        (["nan.npz"], "nan.npz: hypotheses: expected finite"),
        (["nameless.npz"], "expected an array 'joint_names'"),
        (["."], "manifest.json: not a readable manifest"),
    ],
)
def test_refusals(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names, given = {"joint_names": np.array(COCO13_JOINTS)}, example()
    np.savez(folder / "one.npz", heatmaps=observations().heatmaps[:1].numpy())
    (folder / "text.npz").write_text("not an archive")
    np.savez(folder / "short.npz", **{**given, "log_prob": given["log_prob"][:2]}, **names)
    np.savez(folder / "flat.npz", hypotheses=given["hypotheses"][0], **names)
    np.savez(folder / "nan.npz", hypotheses=given["hypotheses"] * np.nan, **names)
    np.savez(folder / "nameless.npz", **given)
    before = sorted(folder.iterdir())
    assert main(["view", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err
    assert sorted(folder.iterdir()) == before


# --- in a browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for path in map(shutil.which, _NAMES) if path), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to draw the page")
WINDOW = (900, 500)  # so low that the panel has its least height, with and without a title bar


def chromium(profile: Path, page: Path, fragment: str, *options: str) -> str:
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={profile}", "--hide-scrollbars"),
        *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
        *("--force-device-scale-factor=1", f"--window-size={WINDOW[0]},{WINDOW[1]}"),
        *("--virtual-time-budget=2000", *options, f"{page.as_uri()}#{fragment}"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


# What a user does, one after the other, and what the page then says.
_ACTIONS = """
<script>
addEventListener("load", () => {
  const said = {}, chosen = () => $("#chosen").textContent;
  const box = canvas.getBoundingClientRect(), pose = selected(), { matrix } = camera();
  said.scripts = document.scripts.length;
  said.webgl = Boolean(gl);
  said.error = gl && gl.getError();
  said.chosen = chosen();
  said.picker = [...picker.options].map((option) => option.text);
  said.panel = [box.left, box.top, box.width, box.height];
  said.joints = LABEL.map((_, j) => project(matrix, pose, j).slice(0, 2));
  const painted = (shown) => {
    Object.assign(state, shown);
    draw();
    const colours = new Uint8Array(4 * canvas.width * canvas.height);
    gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, colours);
    const pixels = new Uint32Array(colours.buffer);
    return pixels.filter((pixel) => pixel !== pixels[0]).length;
  };
  if (gl) {
    const none = { cloud: false, ellipsoids: false };
    said.painted = [none, { ...none, cloud: true }, { ...none, ellipsoids: true }].map(painted);
    painted({ cloud: true, ellipsoids: false });
  }
  rank.value = 2;
  rank.dispatchEvent(new Event("input"));
  said.ranked = chosen();
  said.address = location.hash;
  mode.click();
  said.mode = [chosen(), mode.getAttribute("aria-pressed"), location.hash];
  list.children[12].focus();
  draw();
  said.tip = tip.hidden ? null : tip.textContent;
  said.bar = list.children[12].getAttribute("aria-label");
  const yaw = state.yaw;
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  said.turned = state.yaw !== yaw;
  picker.selectedIndex = 1;
  picker.dispatchEvent(new Event("change"));
  said.person = [$("#subtitle").textContent, location.hash];
  addEventListener("hashchange", () => {
    said.address_read = [chosen(), picker.value, state.cloud];
    const [x, y] = project(camera().matrix, selected(), 3), now = canvas.getBoundingClientRect();
    const at = { pointerId: 1, clientX: now.left + x, clientY: now.top + y };
    if (gl) canvas.dispatchEvent(new PointerEvent("pointermove", at));
    said.hovered = state.joint;
    document.body.dataset.said = JSON.stringify(said);
  });
  location.hash = "#person=6&hypothesis=7&view=front&cloud=0";
});
</script>
"""


def said(dom: str) -> dict[str, Any]:
    found = re.search(r'data-said="([^"]*)"', dom)
    assert found is not None, dom[-2000:]
    value: dict[str, Any] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    return value


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    given = example()
    del given["fit_mean"], given["fit_covariance"]
    names = (HOSTILE, *COCO13_JOINTS[1:])
    write_viewer(path, **given, first=5, joint_names=names, bones=COCO13_BONES, title=HOSTILE)
    acted = path.with_name("acted.html")
    acted.write_text(path.read_text("utf-8").replace("</body>", f"{_ACTIONS}</body>"), "utf-8")
    return path


def text_of(person: int, hypothesis: int) -> str:
    values = example()["log_prob"][person]
    place = int((values > values[hypothesis]).sum()) + 1
    return (
        f"Hypothesis {hypothesis}, log-probability {values[hypothesis]:.2f} nats, "
        f"{place} of {SAMPLES} by it"
    )


@browser
def test_browser_draws_the_selected_skeleton(page: Path, tmp_path: Path) -> None:
    given = example()
    dom = chromium(
        tmp_path / "a",
        page.with_name("acted.html"),
        "person=5&hypothesis=5&view=front",
        "--dump-dom",
    )
    answers = said(dom)
    assert answers["scripts"] == 3  # the hostile texts made none
    assert f"<span>{html.escape(HOSTILE)}</span>" in dom
    assert answers["webgl"]
    assert answers["error"] == 0
    skeleton, cloud, ellipsoids = answers["painted"]
    assert skeleton > 1000
    assert cloud > skeleton + 2000  # the dots alone cover about 600
    assert ellipsoids > skeleton + 400
    assert answers["chosen"] == text_of(0, 5)
    assert answers["picker"] == ["5", "6", "7"]
    third = int(np.argsort(-given["log_prob"][0])[2])
    assert answers["ranked"] == text_of(0, third)
    assert answers["address"] == f"#person=5&hypothesis={third}"
    text, pressed, address = answers["mode"]
    assert text.startswith("The mode")
    assert pressed == "true"
    assert address == "#person=5&hypothesis=mode"
    std = np.sqrt(given["hypotheses"][0, :, 12].var(0).sum())
    assert answers["tip"].startswith(f"right ankle: {std:.0f} mm, in depth ")
    assert answers["bar"] == answers["tip"]
    assert answers["turned"]
    assert "person 6;" in answers["person"][0]
    assert answers["person"][1] == "#person=6&hypothesis=mode"
    assert answers["address_read"] == [text_of(1, 7), "6", False]
    assert answers["hovered"] == 3

    # the front view: x to the right, y down, and the joints' colours where they are said to be
    pose, joints = given["hypotheses"][0, 5], np.array(answers["joints"])
    for axis in (0, 1):
        assert np.corrcoef(joints[:, axis], pose[:, axis])[0, 1] > 0.99
    assert np.polyfit(pose[:, 1], joints[:, 1], 1)[0] > 0
    pictures = {}
    for hypothesis in (5, 9):
        file = tmp_path / f"{hypothesis}.png"
        chromium(
            tmp_path / f"b{hypothesis}",
            page,
            f"person=5&hypothesis={hypothesis}&view=front&cloud=0",
            f"--screenshot={file}",
        )
        pictures[hypothesis] = imread(file)[..., :3]
    left, top, width, height = (round(value) for value in answers["panel"])
    panel = {k: v[top : top + height, left : left + width] for k, v in pictures.items()}
    apart = np.linalg.norm(joints[:, None] - joints, axis=-1) + 100 * np.eye(13)
    alone = np.flatnonzero(apart.min(1) > 20)  # not hidden by another
    assert len(alone) >= 6
    for j in alone:
        x, y = joints[j]
        near = panel[5][round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
        off = np.abs(near - to_rgb(style.JOINT_COLOURS[j])).max(-1)
        assert off.min() < 0.02, COCO13_JOINTS[j]
    changed = np.abs(panel[5] - panel[9]).max(-1) > 0.1
    assert 100 < changed.sum() < 0.3 * changed.size


@browser
def test_browser_without_webgl(page: Path, tmp_path: Path) -> None:
    dom = chromium(
        tmp_path / "c",
        page.with_name("acted.html"),
        "person=5&hypothesis=5",
        "--dump-dom",
        "--disable-3d-apis",
    )
    answers = said(dom)
    assert not answers["webgl"]
    assert answers["chosen"] == text_of(0, 5)
    assert answers["person"][1] == "#person=6&hypothesis=mode"
    assert re.search(r'<p id="no-webgl">[^<]*no WebGL', dom)
    assert re.search(r"<canvas[^>]*hidden", dom)
