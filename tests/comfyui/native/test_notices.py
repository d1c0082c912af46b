"""Words that the checkpoint doesn't know: told in the log and on the node that reads the prompt."""

import logging
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.comfyui

KNOWN = "a man in a red shirt is walking"


@pytest.fixture
def shown(comfy, monkeypatch):
    """What core would show on its nodes."""
    texts = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: texts.append((node, text)))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    return texts


def encode(clip, text, node="6", prompt="first"):
    """Core's CLIP Text Encode, as the server runs it."""
    from comfy_execution.utils import CurrentNodeContext

    from nodes import CLIPTextEncode

    with CurrentNodeContext(prompt, node, None):
        CLIPTextEncode().encode(clip, text)


def test_unknown_words_are_told_in_the_log(rig, caplog):
    with caplog.at_level(logging.WARNING):
        rig.prompt(KNOWN)
        rig.prompt("")
        assert "doesn't know" not in caplog.text
        rig.prompt("a (dragon:1.2) in a red coat")
    assert "S2DM: The checkpoint doesn't know: dragon." in caplog.text


def test_they_are_told_on_the_node_until_they_are_gone(rig, shown):
    clip = rig.loaded.clip
    encode(clip, KNOWN)
    assert shown == []
    encode(clip, "a dragon")
    encode(clip, KNOWN)  # a second text of the same node in the same run
    encode(clip, KNOWN, node="7", prompt="second")
    ((node, text),) = shown
    assert node == "6" and "doesn't know: dragon" in text
    encode(clip, KNOWN, prompt="second")
    encode(clip, KNOWN, prompt="third")
    assert shown[1:] == [("6", "All words of the prompt are known.")]
