"""ComfyUI in this process, the pack loaded as ComfyUI loads it, and a tiny random checkpoint.

`COMFYUI_PATH` (or `S2DM_COMFYUI`) names the ComfyUI; without it these tests are skipped.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
PACK = "comfyui_s2dm_pack"
PROMPT = "a man in a red shirt is walking"


class Rig:
    """The pack's modules, a loaded checkpoint, and short ways to run its nodes."""

    def __init__(self, pack: ModuleType, nodes: dict[str, Any], checkpoint: Path) -> None:
        self.pack = pack
        self.nodes = nodes
        self.checkpoint = checkpoint
        self.loaded = self.module("nodes.native.loading").load_all(str(checkpoint))

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{PACK}.{name}")

    def run(self, node_id: str, **inputs: Any) -> tuple[Any, ...]:
        """Execute a node as the server does, and return its outputs."""
        with torch.inference_mode():
            return self.nodes[node_id].execute(**inputs).args

    def flow(self, frames: int, height: int = 64, width: int = 64, seed: int = 0) -> Any:
        """A smooth random flow."""
        generator = torch.Generator().manual_seed(seed)
        displacement = torch.randn(frames, 2, 4, 4, generator=generator) * 8
        displacement[0] = 0
        size = {"size": (height, width), "mode": "bilinear"}
        displacement = torch.nn.functional.interpolate(displacement, **size)
        return self.module("s2dm.flow").FlowField(
            displacement, torch.zeros(frames, 1, height, width)
        )

    def equal_flow(self, frames: int, **size: int) -> Any:
        """A flow whose frames are all the same: nothing moves."""
        field = self.flow(1, **size)
        return self.module("s2dm.flow").FlowField.zeros(frames, field.height, field.width)

    def prompt(self, text: str = PROMPT) -> list[Any]:
        clip = self.loaded.clip
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def encode(self, flow: Any, prompt: str = PROMPT, **inputs: Any) -> tuple[Any, Any, Any]:
        positive = inputs.pop("positive", None) or self.prompt(prompt)
        negative = inputs.pop("negative", None) or self.prompt("")
        return self.run("S2DMEncodeFlow", positive=positive, negative=negative, flow=flow, **inputs)

    def sample(self, encoded: tuple[Any, Any, Any], model: Any = None, **inputs: Any) -> Any:
        """Sample with the KSampler of the pack, two steps unless told; gives the latents."""
        positive, negative, latent = encoded
        arguments = {
            "seed": 7,
            "steps": 2,
            "cfg": 4.0,
            "sampler_name": "ddim",
            "scheduler": "ddim_uniform",
            **inputs,
        }
        (out,) = self.run(
            "S2DMSharedNoiseKSampler",
            model=self.loaded.model if model is None else model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            **arguments,
        )
        return out["samples"]

    def sample_noise(
        self, encoded: tuple[Any, Any, Any], noise: torch.Tensor, steps: int, cfg: float
    ) -> torch.Tensor:
        """Core's ddim from a given noise."""
        import comfy.sample

        positive, negative, latent = encoded
        with torch.inference_mode():
            return comfy.sample.sample(
                self.loaded.model,
                noise,
                steps,
                cfg,
                "ddim",
                "ddim_uniform",
                positive,
                negative,
                latent["samples"],
                seed=0,
            )

    def run_adapter(self, model: Any) -> tuple[Any, ...]:
        """Put the checkpoint's adapter on a model."""
        apply_adapter = self.module("nodes.native.adapter").apply_adapter
        return (apply_adapter(model, *self.adapter()),)

    def adapter(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The config and the weights of the checkpoint's adapter."""
        config, state = self.module("nodes.native.loading").load_adapter(str(self.checkpoint))
        return config.flow_adapter, state

    def plain_model(self) -> Any:
        """The U-Net as core gives it, without adapter."""
        loading = self.module("nodes.native.loading")
        config, state = self.module("s2dm.models.checkpoint").load_checkpoint(
            self.checkpoint, parts=("unet",)
        )
        return loading.load_model(config, state["unet"])


def random_state(keys: Any, seed: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of a sensible size for a table of keys."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key in keys:
        if len(key.ldm_shape) == 1:
            weight = torch.full(key.ldm_shape, float(key.ldm.endswith("weight")))
        else:
            fan_in = math.prod(key.ldm_shape[1:])
            weight = torch.randn(key.ldm_shape, generator=generator) * gain / math.sqrt(fan_in)
        state[key.ldm] = weight
    return state


def tiny_config(models: ModuleType, tokenizers: ModuleType, fusion: str = "channel") -> Any:
    unet = models.UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(True, True),
        num_heads=2,
        context_dim=64,
    )
    config = models.S2DMConfig(
        unet=unet,
        vae=models.VAEConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1),
        text_encoder=models.TextEncoderConfig(
            hidden_size=64,
            layers=2,
            heads=2,
            intermediate_size=128,
            vocab_size=600,
            bos_token_id=0,
            eos_token_id=1,
        ),
        flow_adapter=models.FlowAdapterConfig.for_unet(unet, width=32, hidden=32, fusion=fusion),
    )
    return tokenizers.with_tokenizer(config, tokenizers.train_tokenizer([PROMPT], 560))


def tiny_states(pack: str, config: Any) -> dict[str, dict[str, torch.Tensor]]:
    keys = importlib.import_module(f"{pack}.s2dm.models.keys")
    torch.manual_seed(5)
    adapter = importlib.import_module(f"{pack}.s2dm.models").FlowAdapter(config.flow_adapter)
    states = {
        "unet": random_state(keys.unet_keys(config.unet), 1),
        "vae": random_state(keys.vae_keys(config.vae), 2),
        "text_encoder": random_state(keys.text_encoder_keys(config.text_encoder), 3),
    }
    generator = torch.Generator().manual_seed(4)
    adapter_state = {name: weight.clone() for name, weight in adapter.state_dict().items()}
    for name, weight in adapter_state.items():
        if ".to_" in name or name == "null":
            weight.copy_(torch.randn(weight.shape, generator=generator) / 6)
    states["flow_adapter"] = adapter_state
    return states


@pytest.fixture(scope="session")
def comfy() -> Path:
    """ComfyUI, importable, on the CPU."""
    named = os.environ.get("COMFYUI_PATH") or os.environ.get("S2DM_COMFYUI")
    if not named:
        pytest.skip("COMFYUI_PATH is not set; `nox -s tests` sets it")
    folder = Path(named).resolve()
    # First, so that `nodes` is ComfyUI's.
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="session")
def pack(comfy: Path) -> ModuleType:
    """The pack, imported from its folder under another name, as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def node_classes(pack: ModuleType) -> dict[str, Any]:
    """The nodes that the pack registers, by id."""

    async def collect() -> list[Any]:
        extension = await pack.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(collect())}


def write_checkpoint(path: Path, fusion: str = "channel") -> Path:
    models = importlib.import_module(f"{PACK}.s2dm.models")
    tokenizers = importlib.import_module(f"{PACK}.s2dm.models.tokenizer")
    config = tiny_config(models, tokenizers, fusion)
    files = importlib.import_module(f"{PACK}.s2dm.models.checkpoint")
    files.save_checkpoint(path, config, tiny_states(PACK, config))
    return path


@pytest.fixture(scope="session")
def rig(
    pack: ModuleType, node_classes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Rig:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return Rig(pack, node_classes, write_checkpoint(path))


@pytest.fixture(scope="session")
def token_rig(
    rig: Rig, node_classes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Rig:
    """The same with token fusion."""
    path = tmp_path_factory.mktemp("tiny") / "token.safetensors"
    return Rig(rig.pack, node_classes, write_checkpoint(path, "token"))
