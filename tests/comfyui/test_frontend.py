"""Each bundled workflow opens in the real interface without a missing node.

Needs Playwright and a Chromium on the path; skipped otherwise. `S2DM_SCREENSHOTS=folder` keeps a
picture of each workflow.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_graph import to_prompt
from comfyui_install import PACK
from comfyui_server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.frontend, pytest.mark.slow]

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
READY = "() => window.LiteGraph?.registered_node_types?.['S2DMEncodeFlow'] && window.app?.graph"
SHOW_ALL = """() => {
    const items = [...app.graph.nodes, ...app.graph.groups];
    const boxes = items.map(item => [...item.pos, ...item.size]);
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    const right = Math.max(...boxes.map(b => b[0] + b[2]));
    const bottom = Math.max(...boxes.map(b => b[1] + b[3]));
    const view = app.canvas.ds;
    const space = [innerWidth - 120, innerHeight - 160];
    view.scale = Math.min(space[0] / (right - left), space[1] / (bottom - top));
    view.offset[0] = 80 / view.scale - left;
    view.offset[1] = 120 / view.scale - top;
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[Any]:
    """A browser page with the interface of the server, past its first-start dialogs."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip("no Chromium on the path")
    server.post("/settings/Comfy.TutorialCompleted", True)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 2000, "height": 1200})
        page.goto(server.url, wait_until="domcontentloaded", timeout=180_000)
        page.wait_for_function(READY, timeout=180_000)
        yield page
        browser.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_interface_shows_the_workflow(page: Any, server: ComfyServer, path: Path) -> None:
    workflow = json.loads(path.read_text("utf-8"))
    missing = page.evaluate(
        "types => types.filter(type => !(type in LiteGraph.registered_node_types))",
        sorted({node["type"] for node in workflow["nodes"]}),
    )
    assert missing == []
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function(f"() => app.graph.nodes.length === {len(workflow['nodes'])}")
    assert page.locator(".p-toast-message-warn, .p-toast-message-error").count() == 0
    if folder := os.environ.get("S2DM_SCREENSHOTS"):
        page.wait_for_timeout(2000)
        page.evaluate(SHOW_ALL)
        page.wait_for_timeout(2000)
        page.screenshot(path=str(Path(folder) / f"{path.stem}.png"))

    shown = page.evaluate("async () => (await app.graphToPrompt()).output")
    ours = to_prompt(workflow, server.object_info())
    assert shown.keys() == ours.keys()
    for node, entry in ours.items():
        # The interface adds what only it has, such as the preview of a video.
        assert shown[node]["inputs"].items() >= entry["inputs"].items(), entry["class_type"]
