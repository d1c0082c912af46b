"""Nodes that train: clips prepared once, and a flow adapter for a model of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..s2dm.data.prepared import (
    ClipsError,
    PreparedClips,
    Source,
    folder_sources,
    frames_source,
    prepare_clips,
)
from ..s2dm.flow.estimate import METHODS
from ..s2dm.models import FUSIONS, load_checkpoint
from ..s2dm.training.flow_adapter import AdapterSettings, AdapterTrainer, new_adapter
from .flow import flow_model, progress_bar
from .native.adapter import apply_adapter
from .native.files import lora_path, trained_path
from .native.saving import keep_when_saving
from .native.training import (
    PRECISIONS,
    encoders,
    frozen,
    model_name,
    new_lora,
    preview,
    trainable_config,
    training_mode,
)
from .pictures import library_frames, video_components
from .runs import (
    at_once_input,
    check_interrupt,
    clips_per_step_input,
    keeping_inputs,
    learning_rate_input,
    loss_output,
    memory,
    named_folder,
    precision_input,
    steps_input,
    train,
)
from .schema import (
    MOST_FRAMES,
    advanced,
    check_finite,
    check_given,
    frames_input,
    named_errors,
    schema,
    seed_input,
    side_inputs,
)
from .types import Clips, OpticalFlowModel

_MODEL = "model"


class PrepareClips(io.ComfyNode):
    """What training needs of each clip, computed once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMPrepareClips",
            display_name="Prepare Clips (S2DM)",
            category="s2dm/training",
            description=(
                "Prepares clips for training: latents, flow and prompt of each, kept in the folder "
                "output/s2dm_clips. A clip that is there already isn't computed again, so a run "
                "that was stopped goes on where it was."
            ),
            search_aliases=["s2dm", "dataset", "train", "cache latents", "captions"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Vae.Input("vae", tooltip="Of the model that is to be trained."),
                io.Clip.Input("clip", tooltip="Of the model that is to be trained."),
                io.String.Input(
                    "name",
                    default="my_clips",
                    tooltip="Of these clips. Other clips under the same name replace them.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip=(
                        "Folder of videos, each with a text file of the same name beside it that "
                        "says what it shows (wave.mp4, wave.txt). In the input folder, or a full "
                        "path. Empty: the connected videos."
                    ),
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What each of the connected videos shows, a line for each, in order.",
                ),
                *side_inputs(
                    "that the clips are brought to, in pixels, cropped at the centre: 128 for the "
                    "bundled checkpoint, 512 for most Stable Diffusion 1.5 models.",
                    most=2048,
                ),
                frames_input(
                    "Frames of each clip, spread from its first to its last. Flow is measured from "
                    "the first, so a clip should show one action.",
                    least=2,
                ),
                io.Combo.Input(
                    "method",
                    options=[*METHODS, _MODEL],
                    default="dis",
                    tooltip=(
                        "How flow is measured, as in Estimate Flow. model: by the network "
                        "connected to optical_flow."
                    ),
                ),
                io.Video.Input(
                    "videos",
                    optional=True,
                    tooltip="One clip or a list of them, beside or in place of the folder.",
                ),
                OpticalFlowModel.Input(
                    "optical_flow",
                    optional=True,
                    tooltip='Network for the method "model": RAFT, from Load Optical Flow Model.',
                ),
            ],
            outputs=[
                Clips.Output(
                    "clips", display_name="clips", tooltip="For Train Flow Adapter (S2DM)."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        vae: list[Any],
        clip: list[Any],
        name: list[str],
        folder: list[str],
        captions: list[str],
        width: list[int],
        height: list[int],
        frames: list[int],
        method: list[str],
        videos: list[Any] | None = None,
        optical_flow: list[Any] | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_given(vae=vae[0], clip=clip[0])
            target = named_folder("s2dm_clips", name[0])
            estimator = method[0]
            if estimator == _MODEL:
                estimator = flow_model((optical_flow or [None])[0])
            # A clip may be long: it can be stopped at each of its frames.
            shape = (frames[0], (height[0], width[0]), estimator, lambda *_: check_interrupt())
            found = folder_sources(_input_folder(folder[0]), *shape) if folder[0].strip() else []
            given = videos or []
            total = len(found) + len(given)
            if not total:
                raise ClipsError(
                    "expected a folder of clips or connected videos, got neither. Fill in one."
                )
            told = _captions(captions, len(given))

            def sources() -> Iterator[Source]:
                yield from found
                for number, (video, caption) in enumerate(zip(given, told, strict=True), 1):
                    pixels = library_frames(video_components(video, f"video {number}").images)
                    yield frames_source(f"video {number}", pixels, caption, *shape)

            brought = encoders(vae[0], clip[0])
            clips = prepare_clips(target, sources(), total, brought, progress_bar(total))
            return io.NodeOutput(clips)

    @classmethod
    def fingerprint_inputs(cls, folder: list[str], **inputs: Any) -> str:
        """Changes when a file of the folder does."""
        if not folder or not folder[0] or not folder[0].strip():
            return ""
        path = _input_folder(folder[0])
        if not path.is_dir():
            return "missing"
        marks = [file.stat() for file in sorted(path.rglob("*"))]
        return str([(mark.st_mtime_ns, mark.st_size) for mark in marks])


def _input_folder(name: str) -> Path:
    return Path(folder_paths.get_input_directory()) / name.strip()  # a full path stays one


def _captions(texts: list[str], count: int) -> list[str]:
    """A caption for each of so many videos.

    Raises:
        ClipsError: more or fewer than that.
    """
    if not count:
        return []
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if len(texts) == count > 1:
        lines = [" ".join(text.split()) for text in texts]
    if len(lines) != count or not all(lines):
        raise ClipsError(
            f"expected {count} captions, one for each connected video, got {len(lines)}. Write a "
            "line for each."
        )
    return lines


class TrainFlowAdapter(io.ComfyNode):
    """A flow adapter for a model of one's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMTrainFlowAdapter",
            display_name="Train Flow Adapter (S2DM)",
            category="s2dm/training",
            description=(
                "Trains a flow adapter for a Stable Diffusion 1.x model, which itself stays as it "
                "is. The adapter is kept in models/s2dm, for Apply Flow Adapter. Cancel when you "
                "like: what was learned stays, and the next run goes on from there."
            ),
            search_aliases=["s2dm", "train", "finetune", "motion adapter", "motion lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Stable Diffusion 1.x model, with or without LoRA. It isn't changed.",
                ),
                Clips.Input("clips", tooltip="From Prepare Clips, with the model's VAE and CLIP."),
                io.String.Input(
                    "name",
                    default="my_adapter",
                    tooltip="Of the adapter's file in models/s2dm.",
                ),
                steps_input(2000),
                learning_rate_input(3e-4),
                io.Combo.Input(
                    "joining",
                    options=list(FUSIONS),
                    default=FUSIONS[0],
                    tooltip=(
                        "How flow reaches the U-Net. channel: added to the prompt's keys and "
                        "values, as in the paper; 77 tokens a frame. token: attention of its own. "
                        "spatial: at the resolution of the latents, added in each layer. "
                        "channel+spatial: both."
                    ),
                ),
                seed_input("Of the adapter's first weights, and of all that training draws."),
                clips_per_step_input(4),
                advanced(
                    io.Int.Input,
                    "frames_per_clip",
                    default=4,
                    min=0,
                    max=4096,
                    tooltip="Frames of each clip in a step, drawn anew each time. 0: all of them.",
                ),
                at_once_input("frames", "U-Net", MOST_FRAMES),
                precision_input("the frozen model computes; the adapter always learns"),
                advanced(
                    io.Boolean.Input,
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Less memory, for more time: the insides of blocks are computed twice.",
                ),
                *keeping_inputs(),
                advanced(
                    io.Int.Input,
                    "lora_rank",
                    default=0,
                    min=0,
                    max=256,
                    tooltip=(
                        "Above 0 a LoRA of this rank learns too, on the attention of the U-Net, "
                        "and is kept in models/loras/s2dm. 0: the adapter alone."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "trained_model",
                    display_name="model",
                    tooltip="A copy of the model that follows flow by the trained adapter.",
                ),
                io.String.Output(
                    "adapter",
                    display_name="adapter",
                    tooltip="Name of the adapter's file, as Apply Flow Adapter lists it.",
                ),
                loss_output(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clips: PreparedClips,
        name: str,
        steps: int = 2000,
        learning_rate: float = 3e-4,
        joining: str = FUSIONS[0],
        seed: int = 0,
        clips_per_step: int = 4,
        frames_per_clip: int = 4,
        frames_at_once: int = 4,
        precision: str = PRECISIONS[0],
        gradient_checkpointing: bool = True,
        save_every: int = 100,
        preview_every: int = 100,
        resume: bool = True,
        lora_rank: int = 0,
    ) -> io.NodeOutput:
        with named_errors(cls), training_mode():
            check_finite(learning_rate=learning_rate)
            check_given(model=model, clips=clips)
            folder = named_folder("s2dm_training", name)
            path = trained_path(folder.name, ours=folder.is_dir())
            told: dict[str, Any] = {"base": model_name(model)}
            if lora_rank:
                told["lora"] = lora_path(folder.name)
            config = trainable_config(model, joining)
            settings = AdapterSettings(
                steps=steps,
                learning_rate=learning_rate,
                clips=clips_per_step,
                frames=frames_per_clip,
                chunk=frames_at_once,
                seed=seed,
                save_every=save_every,
                lora_rank=lora_rank,
            )
            clips = PreparedClips(clips.folder)
            adapter, lora = new_adapter(config, seed), new_lora(model, lora_rank, seed)
            latent_format = model.get_model_object("latent_format")
            remedy = (
                f"Lower frames_at_once (it is {frames_at_once})"
                if frames_at_once > 1
                else "Prepare the clips at a smaller width and height, or choose precision bf16"
            )
            with (
                memory(f"{remedy}, or turn gradient_checkpointing on"),
                frozen(
                    model, adapter, clips, frames_at_once, precision, gradient_checkpointing, lora
                ) as denoiser,
            ):
                trainer = AdapterTrainer(
                    settings, adapter, denoiser, clips, folder, resume, between=check_interrupt
                )
                show = partial(preview, latent_format=latent_format)
                curve = train(trainer, path, save_every, preview_every, show, **told)
            found = load_checkpoint(path, parts=("flow_adapter",))
            if lora_rank:
                state = comfy.utils.load_torch_file(str(told["lora"]), safe_load=True)
                model, _ = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)
            patched = apply_adapter(model, *found["flow_adapter"], sampling=found.config.sampling)
            keep_when_saving(patched, found.config.adapter_only())
            return io.NodeOutput(patched, path.name, curve, ui=ui.PreviewImage(curve))
