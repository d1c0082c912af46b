"""On a real server: unknown words show on the node, and a saved checkpoint is loaded again."""

import asyncio
import struct
import uuid

import aiohttp
import pytest
from comfyui_server import ComfyServer

pytestmark = pytest.mark.comfyui

_TEXT = 3  # core's number for a text that belongs on a node


def encode(text: str, checkpoint: str = "random.safetensors") -> dict:
    return {
        "1": {
            "class_type": "S2DMCheckpointLoader",
            "inputs": {"checkpoint": checkpoint, "frames_at_once": 0},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["6", 0]}},
    }


def texts_on_nodes(server: ComfyServer, prompt: dict) -> list[tuple[str, str]]:
    """What a page that runs the prompt is told to show, as (node, text)."""

    async def listen() -> list[tuple[str, str]]:
        client, told = uuid.uuid4().hex, []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            body = {"prompt": prompt, "client_id": client}
            await asyncio.to_thread(server.post, "/prompt", body)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    kind, length = struct.unpack(">II", message.data[:8])
                    if kind == _TEXT:
                        rest = message.data[8:].decode("utf-8")
                        told.append((rest[:length], rest[length:]))
                elif message.type is aiohttp.WSMsgType.TEXT:
                    kind = message.json()["type"]
                    if kind in ("execution_success", "execution_error"):
                        return told
        return told

    return asyncio.run(asyncio.wait_for(listen(), 120))


def test_words_that_the_checkpoint_does_not_know_show_on_the_node(server: ComfyServer) -> None:
    ((node, text),) = texts_on_nodes(server, encode("a dragon in a red coat"))
    assert node == "6" and "doesn't know: dragon." in text
    assert "S2DM: The checkpoint doesn't know: dragon." in server.log()
    ((node, text),) = texts_on_nodes(server, encode("a man in a red coat"))
    assert (node, text) == ("6", "All words of the prompt are known.")
    assert texts_on_nodes(server, encode("a man in blue jeans")) == []


def test_core_saves_a_checkpoint_that_the_loader_lists_and_loads(server: ComfyServer) -> None:
    save = {
        "1": encode("")["1"],
        "2": {
            "class_type": "CheckpointSave",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "filename_prefix": "s2dm/mine",
            },
        },
    }
    server.run(save)
    (saved,) = (server.base / "output" / "s2dm").glob("*.safetensors")
    assert server.run(encode("a man in a red coat", saved.name))
