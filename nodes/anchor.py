"""The node that holds a clip to its first frame."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..s2dm.flow import FlowField
from ..s2dm.sector import ANCHOR_END
from .native.anchor import anchor_model, sees_reference
from .native.notices import Notice
from .schema import advanced, check_finite, check_given, named_errors, schema, share_input
from .types import Flow

_CHOICES = {"auto": None, "on": True, "off": False}
_NOTICE = Notice("Every frame sees the reference.")


class AnchorToReference(io.ComfyNode):
    """Any picture, any model: the flow takes the picture through the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMAnchorToReference",
            display_name="Anchor to Reference (S2DM)",
            category="s2dm/sampling",
            description=(
                "Holds every frame of a clip near where the flow takes a picture of yours, which "
                "becomes the first frame. Works with any model that draws pictures, with a flow "
                "adapter and without."
            ),
            search_aliases=["s2dm", "image to video", "animate picture", "first frame", "i2v"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "Any model that draws pictures: Stable Diffusion, Flux, Qwen and others. "
                        "Without a flow adapter the flow acts through the anchor alone."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "The first frame of the clip: the same aspect ratio as the flow, in any "
                        "size. Of a batch, the first image is used; alpha is dropped. Without a "
                        "picture the model first draws frame 1 from the same noise, and that is "
                        "the reference."
                    ),
                ),
                Flow.Input(
                    "flow",
                    tooltip=(
                        "The motion of the clip, with one frame of flow for each latent that is "
                        "sampled."
                    ),
                ),
                share_input(
                    "strength",
                    1.0,
                    "How strongly frames are held. 1: they show the picture wherever it can be "
                    "seen; 0: the model is unchanged.",
                ),
                share_input(
                    "end_percent",
                    -1.0,
                    "Where in the noise schedule moving parts are let go, so that the model "
                    "repairs what the motion broke. -1: as the checkpoint recommends, without "
                    f"a recommendation {ANCHOR_END}. 0: the model is unchanged.",
                    least=-1.0,
                ),
                advanced(
                    io.Combo.Input,
                    "reference_attention",
                    options=list(_CHOICES),
                    default="auto",
                    tooltip=(
                        "on: in self-attention every frame also sees the first one; works with the "
                        "U-Nets of Stable Diffusion 1.x, 2.x and XL alone. auto: as the checkpoint "
                        "recommends, or on if it recommends nothing."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "key_frame",
                    options=list(_CHOICES),
                    default="auto",
                    tooltip=(
                        "on: without a reference, the frame that moves most is drawn before frame "
                        "1, so that somebody stands where the flow says; takes the time of two "
                        "frames. auto: as the checkpoint recommends, or off if it recommends "
                        "nothing."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "anchored_model",
                    display_name="model",
                    tooltip="A copy of the model whose frames are anchored to the reference.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        flow: FlowField,
        reference: torch.Tensor | None = None,
        strength: float = 1.0,
        end_percent: float = -1.0,
        reference_attention: str = "auto",
        key_frame: str = "auto",
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(strength=strength, end_percent=end_percent)
            check_given(model=model, vae=vae, flow=flow)
        sees, from_key = _CHOICES[reference_attention], _CHOICES[key_frame]
        blind = sees and not sees_reference(model)
        _NOTICE.tell(
            "this model has no self-attention of Stable Diffusion's kind, so reference_attention "
            "does nothing; the anchor works."
            if blind
            else ""
        )
        end = None if end_percent < 0 else end_percent
        with named_errors(cls):
            anchored = anchor_model(model, vae, reference, flow, strength, end, sees, from_key)
        return io.NodeOutput(anchored)
