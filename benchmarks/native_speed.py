"""Time of sampling in ComfyUI at Stable Diffusion 1.5's size: ours over core's own, in one run.

Core's KSampler draws as many plain images as a clip has frames; ours draws the clip, with a flow
adapter and the automatic chunk, and anchored to a picture. Random weights: they take as long as
trained ones. The cases take turns, and the medians are compared. Time is that of the processor, so
that other programs on the machine don't count.

    COMFYUI_PATH=... python benchmarks/native_speed.py
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common import RESULTS, show

from s2dm.evaluation.protocol import ProtocolCard
from s2dm.files import write_json

TARGETS = {"clip": 1.05, "anchored": 1.25}
"""At most so much of: core's plain images; and, of the anchored clip, of the clip."""
PACK = "comfyui_s2dm_pack"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cfg", type=float, default=7.5, help="1 halves the time")
    parser.add_argument("--repeats", type=int, default=3, help="the medians are reported")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    pack = _load_pack(options.threads)
    cases = _cases(pack, options)
    card = ProtocolCard(
        checkpoint="none: random weights in the sizes of Stable Diffusion 1.5",
        size=(options.size, options.size),
        notes={
            "sampling": f"ddim, {options.steps} steps, guidance {options.cfg:g}, "
            f"{options.frames} frames, {options.dtype}, CPU, {options.threads} thread(s)",
            "repeats": f"{options.repeats}, in turns; processor time, the medians",
        },
    )
    show("Time of sampling in ComfyUI", card)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, run in cases.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
            print(f"{name:10} {seconds[name][-1]:8.1f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        "clip": medians["clip"] / medians["core"],
        "anchored": medians["anchored"] / medians["clip"],
    }
    print()
    for name, over in (("clip", "core"), ("anchored", "clip")):
        met = "met" if ratios[name] <= TARGETS[name] else "MISSED"
        print(f"{name} over {over}: {ratios[name]:.3f} (at most {TARGETS[name]}: {met})")
    write_json(
        RESULTS / "native_speed.json",
        {"protocol": card.to_dict(), "seconds": seconds, "ratios": ratios},
    )


def _load_pack(threads: int) -> ModuleType:
    """The pack as ComfyUI loads it, with ComfyUI's own modules importable."""
    folder = os.environ.get("COMFYUI_PATH")
    if not folder:
        sys.exit("COMFYUI_PATH: expected the folder of ComfyUI, got nothing.")
    sys.path.insert(0, str(Path(folder).resolve()))
    import torch
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(threads)
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        PACK, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


def _cases(pack: ModuleType, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    import torch

    from nodes import KSampler

    def ours(name: str) -> Any:
        return importlib.import_module(f"{PACK}.{name}")

    models, frames, size = ours("s2dm.models"), options.frames, options.size
    generator = torch.Generator().manual_seed(0)
    plain = _random_model(getattr(torch, options.dtype))
    layers = models.FlowAdapterConfig.for_unet(models.UNetConfig())
    state = models.FlowAdapter(layers).state_dict()
    model = ours("nodes.native.adapter").apply_adapter(plain, layers, state)
    displacement = 4 * torch.randn(frames, 2, size, size, generator=generator)
    displacement[0] = 0
    flow = ours("s2dm.flow").FlowField(displacement, torch.zeros(frames, 1, size, size))
    anchored = ours("nodes.native.anchor").anchor_model(
        model, _Pooling(), torch.rand(1, size, size, 3), flow
    )
    prompts = [
        [[torch.randn(1, 77, models.UNetConfig().context_dim, generator=generator), {}]]
        for _ in range(2)
    ]
    empty = {"samples": torch.zeros(frames, 4, size // 8, size // 8)}
    settings = (0, options.steps, options.cfg, "ddim", "ddim_uniform")

    def core() -> None:
        KSampler().sample(plain, *settings, *prompts, empty)

    @torch.inference_mode()
    def clip(model: Any) -> None:
        positive, negative, latent = (
            ours("nodes.conditioning").EncodeFlow.execute(*prompts, flow, guide_flow="off").args
        )
        ours("nodes.sampling").SharedNoiseKSampler.execute(
            model, *settings, positive, negative, latent
        )

    return {
        "core": torch.inference_mode()(core),
        "clip": lambda: clip(model),
        "anchored": lambda: clip(anchored),
    }


def _random_model(dtype: Any) -> Any:
    """Core's Stable Diffusion 1.5, without a checkpoint."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "num_res_blocks": [2] * 4,
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1] * 6 + [0] * 2,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "context_dim": 768,
            "num_heads": 8,
            "adm_in_channels": None,
            "legacy": False,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
    )
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, device, device)


class _Pooling:
    """Stands in for a VAE, whose time is not what is measured."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Any) -> Any:
        import torch.nn.functional as F

        return F.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 2, 1, 1)[:, :4]


if __name__ == "__main__":
    main()
