"""The real interface of ComfyUI in a headless Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import pytest
from comfyui_server import ComfyServer

RENDERERS = ("canvas", "nodes2")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_NODES_2 = "Comfy.VueNodes.Enabled"


@contextmanager
def interface(server: ComfyServer, node: str) -> Iterator[Any]:
    """A page with the interface of the server, past its first-start dialogs; it knows `node`.

    Skips the test where Playwright or a Chromium is missing.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on the path")
    server.post("/settings/Comfy.TutorialCompleted", True)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 2000, "height": 1200}, has_touch=True)
        page.goto(server.url, wait_until="domcontentloaded", timeout=180_000)
        wait_until_ready(page, node)
        yield page
        browser.close()


def interface_version() -> tuple[int, ...]:
    """Major and minor version of the interface that servers of this environment have."""
    return tuple(map(int, version("comfyui-frontend-package").split(".")[:2]))


def wait_until_ready(page: Any, node: str) -> None:
    """Wait until the interface has been loaded and knows the type of node."""
    page.wait_for_function(
        f"() => window.LiteGraph?.registered_node_types?.['{node}'] && window.app?.graph",
        timeout=180_000,
    )


@contextmanager
def drawn_by(page: Any, renderer: str) -> Iterator[str]:
    """The page draws nodes on the canvas, or as elements (Nodes 2.0) where the version can."""
    if page.evaluate(f"() => app.extensionManager.setting.get('{_NODES_2}')") is None:
        if renderer != RENDERERS[0]:
            pytest.skip("this interface has no Nodes 2.0")
        yield renderer
        return
    turn = f"on => app.extensionManager.setting.set('{_NODES_2}', on)"
    page.evaluate(turn, renderer != RENDERERS[0])
    page.wait_for_timeout(1000)
    yield renderer
    page.evaluate(turn, False)
