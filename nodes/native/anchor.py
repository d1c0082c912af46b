"""A clip anchored to its first frame, on any MODEL that draws pictures.

The library makes the anchor and says how it pulls (`Anchor`); here it is made from what a graph
gives, when a run says in which size, and put where core has the guess of the clean sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...s2dm.flow import FlowField
from ...s2dm.flow.geometry import resample
from ...s2dm.flow.inverse import key_frame, rebase
from ...s2dm.models import whole_cells
from ...s2dm.sector import ANCHOR_END, Anchor, ReferenceStates, release, release_levels
from ..pictures import first_picture
from .frames import KEY as FRAMES
from .frames import FramesOfCall, call_in_chunks
from .labels import check_labels, labels_of, of_frame
from .recommended import recommendation_of
from .wrappers import held_adapter

KEY = "s2dm_anchor"
"""Of our wrappers on a MODEL, and of a run's `_Run` in its transformer options."""
_NODE = "Anchor to Reference (S2DM)"


class AnchorError(ValueError):
    """A reference, a flow, a VAE and latents that don't fit one another."""


def anchor_model(
    model: comfy.model_patcher.ModelPatcher,
    vae: comfy.sd.VAE,
    reference: Tensor | None,
    flow: FlowField,
    strength: float = 1.0,
    end: float | None = None,
    reference_attention: bool | None = None,
    from_key_frame: bool | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL whose frames are anchored to the first one.

    Args:
        model: any MODEL of pictures, with a flow adapter or without. An anchor that it may have
            already is replaced.
        vae: encodes pictures as the MODEL has them.
        reference: IMAGE (B, H, W, 1, 3 or 4) in [0, 1], the first one counts, without alpha;
            None to draw frame 1 first, from the noise of the clip.
        flow: of the clip; in the shape of the picture, in any size.
        strength: 0 to 1; with 0 the MODEL itself is returned.
        end: up to which part of the noise schedule frames are anchored, 0 to 1, with 0 the MODEL
            itself is returned; None for what the checkpoint recommends.
        reference_attention: whether frames see frame 1 in self-attention; None for what the
            checkpoint recommends. Only the U-Nets of Stable Diffusion can.
        from_key_frame: whether the frame that moves most is drawn before frame 1, which is then
            anchored to it; None for what the checkpoint recommends. With a reference, or where
            the model sees no flow, there is none.

    Raises:
        ValueError: the reference is no picture.
        AnchorError: its shape isn't that of the flow.
    """
    picture = None
    if reference is not None:
        picture = first_picture(reference, "reference").float().cpu().contiguous()
        _check_aspect("the flow", flow.height, flow.width, "the reference", *picture.shape[-2:])
    recommended = recommendation_of(model)
    anchors = recommended is not None and recommended.anchor_end > 0
    if end is None:
        end = recommended.anchor_end if anchors else ANCHOR_END
    if not strength or not end:
        return model
    if reference_attention is None:
        reference_attention = recommended.reference_attention if anchors else True
    if from_key_frame is None:
        from_key_frame = anchors and recommended.key_frame
    patched = model.clone()
    call_in_chunks(patched, None)
    anchoring = _Anchoring(vae, picture, flow, strength, end, from_key_frame)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: anchoring.outer_sample,
        WrappersMP.SAMPLER_SAMPLE: anchoring.sampler_sample,
        WrappersMP.PREDICT_NOISE: _predict_noise,
        WrappersMP.APPLY_MODEL: _apply_model,
    }
    for kind in wrappers:
        patched.remove_wrappers_with_key(kind, KEY)
    if not (reference_attention and sees_reference(model)):
        del wrappers[WrappersMP.PREDICT_NOISE], wrappers[WrappersMP.APPLY_MODEL]
    for kind, wrapper in wrappers.items():
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    if _anchored not in patched.model_options.get("sampler_post_cfg_function", ()):
        patched.set_model_sampler_post_cfg_function(_anchored)
    return patched


def sees_reference(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a MODEL has the self-attention of Stable Diffusion's U-Nets, frame by frame."""
    return _frame_by_frame(model.get_model_object("diffusion_model"))


def _frame_by_frame(network: Any) -> bool:
    return (
        isinstance(network, openaimodel.UNetModel)
        and not network.use_temporal_resblocks
        and any("attn1" in name for name, _ in network.named_modules())
    )


@dataclass(eq=False)
class _Anchoring:
    """What a MODEL is anchored to, and the anchor of the run."""

    vae: comfy.sd.VAE
    picture: Tensor | None
    flow: FlowField
    strength: float
    end: float
    from_key_frame: bool
    _anchor: Anchor | None = None
    _shape: tuple[int, ...] = ()

    def outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Before the model is loaded, the VAE encodes what it is to be anchored to."""
        shape = tuple(noise.shape)
        self._check_latents(shape)
        guider = executor.class_obj
        if self.picture is None or shape != self._shape:
            # Both, or a run that is cancelled here would leave the next one without an anchor.
            self._anchor, self._shape = None, ()
            picture = self.picture
            if picture is None:
                picture = self._first_frame(executor, noise, latent_image, *args, **kwargs)
            self._anchor = self._anchor_to(picture, self.flow, guider.model_patcher.model, shape)
            self._shape = shape
        return executor(noise, latent_image, *args, **kwargs)

    def _first_frame(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Frame 1 as the model draws it by itself, (1, 3, H, W) in [0, 1].

        Zero flow doesn't say where anybody is. Drawn after a key frame, frame 1 shows them there.
        """
        guider = executor.class_obj
        key = self._key_frame(guider, len(noise))
        if key:
            # The flow has to act from the start, where it is decided who stands where.
            picture = self._frame(key, 0.0, executor, noise, *args, **kwargs)
            model, shape = guider.model_patcher.model, (2, *noise.shape[1:])
            anchor = self._anchor_to(picture, rebase(self.flow, [key, 0]), model, shape)
            self._anchor = anchor.of_frame(1)
        return self._frame(0, None, executor, noise, *args, **kwargs)

    def _key_frame(self, guider: Any, num_frames: int) -> int:
        """Which frame is drawn before frame 1, counted from 0; 0 for none.

        None where the model doesn't see the flow, where nothing moves, and where a ControlNet or
        GLIGEN says by itself where things stand, of each frame or of frame 1 alone.
        """
        told = {name for entries in guider.conds.values() for entry in entries for name in entry}
        if not self.from_key_frame or told & {"control", "gligen"}:
            return 0
        if held_adapter(guider.model_patcher) is None:
            return 0
        check_labels(guider.conds, num_frames)
        follows = any(label.strength for label in labels_of(guider.conds))
        return key_frame(self.flow) if follows else 0

    def _frame(
        self,
        index: int,
        flow_start: float | None,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A frame of the clip, counted from 0, sampled alone: (1, 3, H, W) in [0, 1]."""
        guider, part = executor.class_obj, slice(index, index + 1)
        # Core and our labels write to the entries of a run, so each run has its own.
        conds = {name: [_copy(entry) for entry in told] for name, told in guider.conds.items()}
        guider.conds = {
            name: [of_frame(entry, index, flow_start) for entry in told]
            for name, told in guider.conds.items()
        }
        if "latent_shapes" in kwargs and kwargs["latent_shapes"] is not None:
            kwargs["latent_shapes"] = [(1, *noise.shape[1:])]
        mask = denoise_mask
        if mask is not None:  # as core repeats and cuts it
            mask = mask[index % len(mask)][None]
        own = (noise[part], latent_image[part], sampler, sigmas, mask, None, True, seed)
        latent = executor(*own, **kwargs)
        guider.conds = conds
        pictures = self.vae.decode(latent)
        picture = pictures.reshape(-1, *pictures.shape[-3:])[:1]
        return picture.movedim(-1, 1).float().cpu().clamp(0, 1)

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The model is loaded, and with it the noise schedule that holds for this run."""
        schedule = guider.model_patcher.model.model_sampling

        def sigma(part: float) -> float:
            return float(schedule.percent_to_sigma(part))

        # Until the flow acts all frames are the same, and one is enough.
        starts = [label.start for label in labels_of(guider.conds) if label.start is not None]
        levels = (sigma(min(starts, default=0.0)), *release_levels(self.end, sigma))
        # Core made these options for this run alone.
        options = extra_args["model_options"].setdefault("transformer_options", {})
        if self._anchor is not None:
            options[KEY] = _Run(self._anchor, *levels)
        return executor(guider, sigmas, extra_args, *args, **kwargs)

    def _check_latents(self, shape: tuple[int, ...]) -> None:
        if len(_plane(shape)) != 2:
            raise AnchorError(
                f"{_NODE}: expected latents of pictures (frames, channels, height, width), got "
                f"{shape}. Sample with a model that draws pictures, one for each frame."
            )
        if self.flow.num_frames != shape[0]:
            raise AnchorError(
                f"{_NODE}: expected a flow of {shape[0]} frames, one for each latent, got "
                f"{self.flow.num_frames}. Sample as many latents as the flow has frames, or make "
                "flow of as many frames."
            )

    def _anchor_to(
        self, picture: Tensor, flow: FlowField, model: Any, shape: tuple[int, ...]
    ) -> Anchor:
        channels, size = shape[1], _plane(shape)

        def encode(pictures: Tensor) -> Tensor:
            # One at a time: a VAE of videos would take several for a video.
            latents = [self._encode(picture[None]) for picture in pictures]
            if tuple(latents[0].shape[1:]) != (channels, *size):
                raise AnchorError(
                    f"{_NODE}: expected a VAE that encodes the reference to the MODEL's latents "
                    f"{(channels, *size)}, got {tuple(latents[0].shape[1:])}. Connect the VAE of "
                    "the MODEL's own checkpoint."
                )
            # As the sampler has them, in all their dimensions.
            encoded = torch.cat(latents).view(-1, *shape[1:])
            return model.process_latent_in(encoded).view(-1, channels, *size)

        picture, flow = self._fitted(picture, flow, *(side * _cell(self.vae) for side in size))
        return Anchor.of(picture, flow, encode, self.strength)

    def _encode(self, picture: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latent = self.vae.encode(picture.movedim(1, -1))
        return latent.squeeze(2) if latent.ndim == 5 else latent

    def _fitted(
        self, picture: Tensor, flow: FlowField, height: int, width: int
    ) -> tuple[Tensor, FlowField]:
        """Picture and flow in the size that the latents stand for."""
        cell = _cell(self.vae)
        size = flow.height, flow.width
        if tuple(whole_cells(side, cell) for side in size) != (height, width):
            _check_aspect("the latents", height, width, "the flow", *size, slack=cell)
            size = height, width
        # Encode Flow (S2DM) fills the last cells in the same way.
        margin = (0, width - size[1], 0, height - size[0])
        if tuple(picture.shape[-2:]) != (height, width):
            picture = F.pad(resample(picture, *size), margin, mode="replicate")
        return picture, flow.resize(*size).pad(height, width)


@dataclass(eq=False)
class _Run:
    """An anchor in one run of sampling, and the states of frame 1 in its present step."""

    anchor: Anchor
    start: float
    begin: float
    end: float
    states: ReferenceStates = field(default_factory=ReferenceStates)

    def pull(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The guess of the clean sample, drawn to the anchor as far as the noise level says."""
        latents = self.anchor.latents
        frames = denoised.squeeze(2) if denoised.ndim == 5 else denoised
        if frames.shape != latents.shape:
            raise AnchorError(
                f"{_NODE}: expected a sampler that keeps the size and the number of the latents, "
                f"{tuple(latents.shape)}, got {tuple(denoised.shape)}. Choose another sampler."
            )
        level = float(sigma.max())
        if level > self.start:
            return denoised
        weight = release(level, self.begin, self.end)
        return self.anchor.pull(frames, weight).view_as(denoised)


def _anchored(arguments: dict[str, Any]) -> Tensor:
    """After guidance, because guidance overshoots."""
    run = arguments["model_options"].get("transformer_options", {}).get(KEY)
    denoised = arguments["denoised"]
    return denoised if run is None else run.pull(denoised, arguments["sigma"])


def _predict_noise(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], *args: Any
) -> Tensor:
    """A step begins: frame 1 doesn't look any more as it did in the last one."""
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is not None:
        run.states = ReferenceStates()
    return executor(x, timestep, model_options, *args)


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A call of the U-Net, with a chunk of the frames: show them frame 1."""
    options = transformer_options or {}
    run, call = options.get(KEY), options.get(FRAMES)
    if run is not None and isinstance(call, FramesOfCall):
        if _frame_by_frame(executor.class_obj.diffusion_model):
            patch = _BesideFrame1(run.states, call, options)
            patches = options.get("patches", {})
            # After those of other nodes, of whatever they make of the keys.
            before = patches.get("attn1_patch", [])
            options = {**options, "patches": {**patches, "attn1_patch": [*before, patch]}}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


class _BesideFrame1:
    """Puts the states of frame 1 beside the keys and values of every self-attention layer."""

    def __init__(
        self, states: ReferenceStates, call: FramesOfCall, options: dict[str, Any]
    ) -> None:
        self.states = states
        self.frames = call.frames
        self.first = _number_of_first(options, call.frames) == 0
        ids = call.conditions or (None,)
        # One id may stand for several areas of one prompt.
        self.conditions = [(one, ids[:place].count(one)) for place, one in enumerate(ids)]
        self.replaced = options.get("patches_replace", {}).get("attn1", {})

    def __call__(
        self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        block, index = extra.get("block"), extra.get("block_index", 0)
        # What another node puts in the place of self-attention doesn't know of further keys.
        if block is None or block in self.replaced or (*block[:2], index) in self.replaced:
            return n, context, value
        layer = (*block, index)
        shared = value is context
        context = self._beside((layer, "k"), context, len(n))
        return n, context, context if shared else self._beside((layer, "v"), value, len(n))

    def _beside(self, layer: Any, states: Tensor, rows: int) -> Tensor:
        """(rows, L, C) to (rows, 2 L, C). HyperTile makes several rows of a frame."""
        states = states.reshape(rows, -1, states.shape[-1])
        of_frames = states.reshape(len(self.conditions) * len(self.frames), -1, states.shape[-1])
        try:
            beside = [
                self.states.beside((layer, condition), part, 1, self.first)
                for condition, part in zip(
                    self.conditions, of_frames.chunk(len(self.conditions)), strict=True
                )
            ]
        except RuntimeError as error:
            raise AnchorError(
                f"{_NODE}: expected the first context window of a step to begin with frame 1, "
                "which all frames see in self-attention, got another one. Remove the Context "
                "Windows node, because frames are sampled in chunks; or choose its schedule "
                "standard_static, or set reference_attention to off."
            ) from error
        return torch.cat([states, torch.cat(beside).view_as(states)], dim=1)


def _number_of_first(options: dict[str, Any], frames: range) -> int:
    """Which frame of the clip a call begins with, counted from 0, also in a context window."""
    numbers = (options.get("ad_params") or {}).get("sub_idxs")
    first = frames.start if numbers is None else numbers[0]
    window = options.get("context_window")
    if window is None or window.dim != 0:
        return first
    before = getattr(window, "causal_anchor_index", None)
    return [*(() if before is None or before < 0 else (before,)), *window.index_list][first]


def _copy(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "model_conds": dict(entry.get("model_conds", {}))}


def _plane(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of latents, also of models whose latents could be those of videos."""
    size = shape[2:]
    return size[1:] if len(size) == 3 and size[0] == 1 else size


def _cell(vae: comfy.sd.VAE) -> int:
    """Pixels along each side of a latent's cell."""
    return int(vae.spacial_compression_encode())


def _check_aspect(
    wanted: str, height: int, width: int, got: str, got_height: int, got_width: int, slack: int = 8
) -> None:
    """Whether a picture in one size may be stretched to another, but for a cell's rounding."""
    factor = max(height / got_height, width / got_width)
    if max(got_height * factor - height, got_width * factor - width) > slack:
        raise AnchorError(
            f"expected {got} in the shape of {wanted}, {width}x{height}, got "
            f"{got_width}x{got_height}. Crop it with Fit Clip (S2DM) or Upscale Image."
        )
