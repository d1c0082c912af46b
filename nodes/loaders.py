"""Nodes that load: a whole S2DM checkpoint, or a flow adapter for a MODEL that is there."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..s2dm.models import load_checkpoint
from .native.adapter import apply_adapter, tell_other_prediction
from .native.files import find_file, list_files
from .native.loading import load_all, load_flow_generator, load_flow_models
from .native.saving import keep_when_saving
from .schema import advanced, check_finite, check_given, flow_strength, named_errors, schema
from .types import FlowGenerator, NoFlowGenerator, OpticalFlowModel

_FILES = "from models/s2dm or output/s2dm, or bundled with the pack"


def _frames_at_once() -> io.Input:
    return advanced(
        io.Int.Input,
        "frames_at_once",
        default=0,
        min=0,
        max=4096,
        tooltip=(
            "How many frames the U-Net computes at once. Fewer frames need less memory, and the "
            "result is the same. 0: chosen for the machine."
        ),
    )


class CheckpointLoader(io.ComfyNode):
    """A checkpoint with all its parts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMCheckpointLoader",
            display_name="Load Checkpoint (S2DM)",
            category="s2dm/loaders",
            description=(
                "Loads an S2DM checkpoint. The MODEL already follows flow, and carries the "
                "sampling settings that the checkpoint recommends. Other nodes take MODEL, CLIP "
                "and VAE as usual."
            ),
            search_aliases=["s2dm", "load model", "flow to video", "sector-shaped diffusion"],
            inputs=[
                io.Combo.Input(
                    "checkpoint", options=list_files(), tooltip=f"An S2DM checkpoint {_FILES}."
                ),
                _frames_at_once(),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The U-Net with its flow adapter.",
                ),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="The text encoder, for CLIP Text Encode.",
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="For VAE Decode."),
                FlowGenerator.Output(
                    "flow_generator",
                    display_name="flow_generator",
                    tooltip=(
                        "Stage 1, for Generate Flow. Empty if the checkpoint holds only stage 2."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, checkpoint: str, frames_at_once: int = 0) -> io.NodeOutput:
        with named_errors(cls):
            loaded = load_all(find_file(checkpoint), frames_at_once)
            stage1 = loaded.stage1 or NoFlowGenerator(f"{checkpoint} holds stage 2 alone")
            return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, stage1)


class ApplyFlowAdapter(io.ComfyNode):
    """Flow for a model of one's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMApplyFlowAdapter",
            display_name="Apply Flow Adapter (S2DM)",
            category="s2dm/loaders",
            description=(
                "Makes a MODEL with the U-Net of Stable Diffusion 1.x, 2.x or XL follow flow, and "
                "sets the sampling that the adapter recommends. LoRA, ControlNet and the like "
                "still work, before or after this node."
            ),
            search_aliases=["s2dm", "motion adapter", "optical flow adapter", "flow lora"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A Stable Diffusion 1.5 model, with or without LoRA. A flow adapter "
                        "already on it is replaced."
                    ),
                ),
                io.Combo.Input(
                    "adapter",
                    options=list_files(),
                    tooltip=f"A flow adapter, or a checkpoint with one, {_FILES}.",
                ),
                flow_strength(
                    "How strongly flow acts. 0: not at all, the model is unchanged; 1: as in "
                    "training."
                ),
                _frames_at_once(),
            ],
            outputs=[
                io.Model.Output(
                    "patched_model",
                    display_name="model",
                    tooltip="A copy of the model that follows the flow of Encode Flow.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, adapter: str, strength: float = 1.0, frames_at_once: int = 0
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(strength=strength)
            check_given(model=model)
            found = load_checkpoint(find_file(adapter), parts=("flow_adapter",))
            sampling = found.config.sampling
            patched = apply_adapter(
                model, *found["flow_adapter"], strength, frames_at_once, sampling
            )
            tell_other_prediction(model, found.config.schedule)
            keep_when_saving(patched, found.config.adapter_only(), strength)
            return io.NodeOutput(patched)


class RegionMotionLoader(io.ComfyNode):
    """LFDM's models, or a region-motion model of one's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMRegionMotionLoader",
            display_name="Load Region Motion (S2DM)",
            category="s2dm/loaders",
            description=(
                "Loads a region-motion model (LFDM's RegionMM), which measures the motion of "
                "clips, and LFDM's flow generator if the file holds it."
            ),
            search_aliases=["s2dm", "lfdm", "regionmm", "mraa", "optical flow", "stage 1"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(),
                    tooltip=f"A file with a region-motion model, {_FILES}. s2dm convert makes it.",
                ),
            ],
            outputs=[
                OpticalFlowModel.Output(
                    "optical_flow",
                    display_name="optical_flow",
                    tooltip='For Estimate Flow, method "model". Its occlusion is soft.',
                ),
                FlowGenerator.Output(
                    "flow_generator",
                    display_name="flow_generator",
                    tooltip=(
                        "LFDM as stage 1, for Generate Flow. Empty if the file holds the "
                        "region-motion model alone."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        with named_errors(cls):
            regions, stage1 = load_flow_models(find_file(file))
            none = NoFlowGenerator(f"{file} holds a region-motion model alone")
            return io.NodeOutput(regions, stage1 or none)


class FlowGeneratorLoader(io.ComfyNode):
    """Stage 1 that was trained alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMFlowGeneratorLoader",
            display_name="Load Flow Generator (S2DM)",
            category="s2dm/loaders",
            description=(
                "Loads a flow generator that Train Flow Generator has made, with the CLIP and VAE "
                "that it was trained on."
            ),
            search_aliases=["s2dm", "stage 1", "text to motion", "load model"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(),
                    tooltip=f"A file with a flow generator, {_FILES}.",
                ),
                io.Clip.Input("clip", tooltip="That it was trained with."),
                io.Vae.Input("vae", tooltip="That it was trained with."),
            ],
            outputs=[
                FlowGenerator.Output(
                    "flow_generator",
                    display_name="flow_generator",
                    tooltip="Stage 1, for Generate Flow.",
                ),
            ],
        )

    @classmethod
    def execute(cls, file: str, clip: Any, vae: Any) -> io.NodeOutput:
        with named_errors(cls):
            check_given(clip=clip, vae=vae)
            return io.NodeOutput(load_flow_generator(find_file(file), clip, vae))
