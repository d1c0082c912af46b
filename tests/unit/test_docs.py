"""README, docs and help pages: links lead somewhere, figures are those of files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.models import read_config
from s2dm.video import read_clip

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [*ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/*.md")]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
        if "://" not in target
    ]
    assert len(links) > 20
    for page, target in links:
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page}: {target}"


@pytest.mark.slow
def test_the_readme_has_python_that_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    (tmp_path / "workflows").mkdir()
    example = shutil.copy(ROOT / "workflows" / "s2dm_example.mp4", tmp_path / "workflows")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    frames, fps = read_clip(tmp_path / "new.mp4")
    assert frames.shape == (16, 3, 128, 128)
    assert fps == pytest.approx(read_clip(example, frames=16)[1])
    assert frames.std() > 0.1


def test_the_results_page_is_what_the_report_writes():
    page = ROOT / "docs" / "results.md"
    code = "import report; print(report.page(), end='')"
    made = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert made.stdout == page.read_text("utf-8")


def test_nobody_is_told_to_type_in_what_the_checkpoint_recommends():
    """Nodes and templates name no number of the bundled checkpoint; its help page does."""
    advice = read_config(DEFAULT_CHECKPOINT).sampling
    numbers = (f"{advice.guidance_scale:g}", f"{advice.flow_start:g}")
    texts = [*ROOT.glob("locales/*/nodeDefs.json"), *ROOT.glob("workflows/*.json")]
    assert len(texts) >= 9
    for file in texts:
        text = json.dumps(json.loads(file.read_text("utf-8")), ensure_ascii=False)
        text = re.sub(r"(\d),(\d)", r"\1.\2", text)
        assert not [number for number in numbers if re.search(rf"(?<![\d.]){number}(?!\d)", text)]
    page = (ROOT / "web" / "docs" / "S2DMCheckpointLoader.md").read_text("utf-8")
    assert all(number in page for number in numbers)
    assert advice.flow_guidance_scale == 1  # "guide_flow off", says the page
    assert "*guide_flow* off" in page


def test_help_in_other_languages_has_every_page_and_heading():
    """Where the interface looks for it: docs/<node>/<language>.md, then docs/<node>.md."""
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    for name, node in nodes.items():
        page = ROOT / "web" / "docs" / f"{name}.md"
        headings = re.findall(r"^#+ ", page.read_text("utf-8"), re.M)
        sockets = {socket["name"] for socket in node["outputs"].values()} | set(node["inputs"])
        for language in ("zh", "ja", "ko"):
            other = ROOT / "web" / "docs" / name / f"{language}.md"
            text = other.read_text("utf-8")
            assert re.findall(r"^#+ ", text, re.M) == headings, other
            assert not [socket for socket in sockets if f"**{socket}**" not in text], other
