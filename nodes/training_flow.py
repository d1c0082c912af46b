"""The node that trains stage 1, a flow generator for clips of one's own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..s2dm.data.prepared import PreparedClips
from ..s2dm.models.presets import FLOW_GENERATORS
from ..s2dm.training.flow_generator import (
    FlowGeneratorSettings,
    FlowGeneratorTrainer,
    fitted,
    measure,
    new_flow_generator,
    preset_size,
    read_flow_clips,
)
from .native.files import trained_path
from .native.loading import latent_scale, load_flow_generator
from .native.training import PRECISIONS, caption_texts, check_vae, making_room, training_mode
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
from .schema import check_finite, check_given, named_errors, schema, seed_input
from .types import Clips, FlowGenerator

_PRESET = "lfdm"


class TrainFlowGenerator(io.ComfyNode):
    """Stage 1 for motions of one's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMTrainFlowGenerator",
            display_name="Train Flow Generator (S2DM)",
            category="s2dm/training",
            description=(
                "Trains stage 1, which makes motion from a prompt and a first frame, on prepared "
                "clips. It is kept in models/s2dm, for Load Flow Generator. Cancel when you like: "
                "what was learned stays, and the next run goes on from there."
            ),
            search_aliases=["s2dm", "train", "stage 1", "text to motion", "lfdm"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="That reads the prompts, there and in use."),
                io.Vae.Input("vae", tooltip="With which the clips were prepared."),
                Clips.Input("clips", tooltip="From Prepare Clips, with this VAE."),
                io.String.Input(
                    "name",
                    default="my_motion",
                    tooltip="Of the flow generator's file in models/s2dm.",
                ),
                steps_input(10_000),
                learning_rate_input(2e-4),
                io.Combo.Input(
                    "preset",
                    options=list(FLOW_GENERATORS),
                    default=_PRESET,
                    tooltip=(
                        "Size of the network. lfdm: as LFDM's, for Stable Diffusion and a GPU. "
                        "puppets: the bundled checkpoint's, small enough for a CPU."
                    ),
                ),
                seed_input("Of the network's first weights, and of all that training draws."),
                clips_per_step_input(8),
                at_once_input("clips", "network", 256),
                precision_input("the network computes; its weights always learn"),
                *keeping_inputs(),
            ],
            outputs=[
                FlowGenerator.Output(
                    "flow_generator",
                    display_name="flow_generator",
                    tooltip="The trained stage 1, for Generate Flow.",
                ),
                io.String.Output(
                    "file",
                    display_name="file",
                    tooltip="Name of the file, as Load Flow Generator lists it.",
                ),
                loss_output(),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        clips: PreparedClips,
        name: str,
        steps: int = 10_000,
        learning_rate: float = 2e-4,
        preset: str = _PRESET,
        seed: int = 0,
        clips_per_step: int = 8,
        clips_at_once: int = 4,
        precision: str = PRECISIONS[0],
        save_every: int = 100,
        preview_every: int = 100,
        resume: bool = True,
    ) -> io.NodeOutput:
        with named_errors(cls), training_mode():
            check_finite(learning_rate=learning_rate)
            check_given(clip=clip, vae=vae, clips=clips)
            folder = named_folder("s2dm_training", name)
            path = trained_path(folder.name, ours=folder.is_dir())
            settings = FlowGeneratorSettings(
                steps=steps,
                learning_rate=learning_rate,
                clips=clips_per_step,
                chunk=clips_at_once,
                seed=seed,
                save_every=save_every,
            )
            clips = PreparedClips(clips.folder)
            check_vae(vae, clips)
            size, texts = preset_size(preset), caption_texts(clip, clips.captions)
            data = read_flow_clips(clips, size.size, latent_scale(vae), texts, check_interrupt)
            network = new_flow_generator(fitted(size, data, *measure(data.conditions)), seed)
            remedy = (
                f"Lower clips_at_once (it is {clips_at_once})"
                if clips_at_once > 1
                else "Choose precision bf16, or the preset puppets under another name"
            )
            with memory(remedy), making_room(network, clips_at_once, precision) as (device, dtype):
                trainer = FlowGeneratorTrainer(
                    settings, network, data, clips, device, folder, resume, dtype,
                    between=check_interrupt,
                )  # fmt: skip
                show = FlowGeneratorTrainer.picture
                curve = train(trainer, path, save_every, preview_every, show)
            stage1 = load_flow_generator(str(path), clip, vae)
            return io.NodeOutput(stage1, path.name, curve, ui=ui.PreviewImage(curve))
