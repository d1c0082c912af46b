"""ComfyUI in this process, the pack loaded as ComfyUI loads it, and a tiny random checkpoint.

`COMFYUI_PATH` (or `S2DM_COMFYUI`) names the ComfyUI; without it these tests are skipped.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from random_checkpoint import tiny_config, write_random_checkpoint

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

    def sample_guided(self, guider: Any, sampler: Any, sigmas: Any, latent: Any) -> Any:
        """Samples of core's SamplerCustomAdvanced with our NOISE, whose seed is 5."""
        from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

        (noise,) = self.run("S2DMSharedNoise", seed=5)
        with torch.inference_mode():
            if hasattr(SamplerCustomAdvanced, "execute"):
                out, _ = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args
            else:  # in 0.3.64
                out, _ = SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, latent)
        return out["samples"]

    def run_adapter(self, model: Any) -> tuple[Any, ...]:
        """Put the checkpoint's adapter on a model."""
        apply_adapter = self.module("nodes.native.adapter").apply_adapter
        return (apply_adapter(model, *self.adapter()),)

    def adapter(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The config and the weights of the checkpoint's adapter."""
        files = self.module("s2dm.models.checkpoint")
        return files.load_checkpoint(self.checkpoint, parts=("flow_adapter",))["flow_adapter"]

    def plain_model(self) -> Any:
        """The U-Net as core gives it, without adapter."""
        loading = self.module("nodes.native.loading")
        files = self.module("s2dm.models.checkpoint")
        return loading.load_model(files.load_checkpoint(self.checkpoint, parts=("unet", "vae")))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI, importable, on the CPU, with folders of its own for models, input and output."""
    named = os.environ.get("COMFYUI_PATH") or os.environ.get("S2DM_COMFYUI")
    if not named:
        pytest.skip("COMFYUI_PATH is not set; `nox -s tests` sets it")
    folder = Path(named).resolve()
    # First, so that `nodes` is ComfyUI's.
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(tmp_path_factory.mktemp("base"))
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="session")
def comfy_version(comfy: Path) -> tuple[int, ...]:
    """Which ComfyUI this is, for what only some versions can do."""
    import comfyui_version

    return tuple(int(part) for part in comfyui_version.__version__.split(".")[:3])


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


@pytest.fixture(scope="session")
def rig(
    pack: ModuleType, node_classes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Rig:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    config = tiny_config(flow_generator=None)
    return Rig(pack, node_classes, write_random_checkpoint(path, config))


@pytest.fixture(scope="session")
def rig_of(
    rig: Rig, node_classes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Rig]:
    """The same with a fusion."""

    @functools.cache
    def of(fusion: str) -> Rig:
        if fusion == "channel":
            return rig
        path = tmp_path_factory.mktemp("tiny") / f"{fusion}.safetensors"
        config = tiny_config(fusion, flow_generator=None)
        return Rig(rig.pack, node_classes, write_random_checkpoint(path, config))

    return of
