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


def test_a_picture_moves_through_a_clip(server: ComfyServer) -> None:
    """Any image and any flow of its shape, here of zeros, so that every frame is the picture."""

    def image(color: int, frames: int) -> dict:
        size = {"width": 64, "height": 64, "batch_size": frames, "color": color}
        return {"class_type": "EmptyImage", "inputs": size}

    prompts = {
        name: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}
        for name, text in (("6", "a man in a red coat"), ("7", ""))
    }
    server.run(
        {
            "1": encode("")["1"],
            "2": image(0x4080C0, 1),
            "3": image(0, 3),
            "4": {
                "class_type": "S2DMEstimateFlow",
                "inputs": {"frames": ["3", 0], "method": "dis"},
            },
            **prompts,
            "8": {
                "class_type": "S2DMEncodeFlow",
                "inputs": {"positive": ["6", 0], "negative": ["7", 0], "flow": ["4", 0]}
                | {"strength": 1.0, "start_percent": -1.0, "end_percent": 1.0}
                | {"guide_flow": "auto", "width": 0, "height": 0},
            },
            "9": {
                "class_type": "S2DMAnchorToReference",
                "inputs": {"model": ["1", 0], "vae": ["1", 2], "reference": ["2", 0]}
                | {"flow": ["4", 0], "strength": 1.0, "end_percent": -1.0}
                | {"reference_attention": "auto", "key_frame": "auto"},
            },
            "10": {
                "class_type": "S2DMSharedNoiseKSampler",
                "inputs": {"model": ["9", 0], "positive": ["8", 0], "negative": ["8", 1]}
                | {"latent_image": ["8", 2], "seed": 1, "steps": 2, "cfg": 2.0, "denoise": 1.0}
                | {"sampler_name": "ddim", "scheduler": "ddim_uniform"}
                | {"noise_sharing": "shared", "share": 0.5},
            },
            "11": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["1", 2]}},
            "12": {
                "class_type": "SaveImage",
                "inputs": {"images": ["11", 0], "filename_prefix": "anchored"},
            },
        }
    )
    frames = [path.read_bytes() for path in (server.base / "output").glob("anchored*.png")]
    assert len(frames) == 3
