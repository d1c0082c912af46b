"""Data sets. `puppets`: procedural people with exact optical flow."""

from .puppets import (
    ACTIONS,
    PERSONS,
    Clip,
    PuppetClips,
    caption,
    render_clip,
    split,
    training_captions,
)

__all__ = [
    "ACTIONS", "PERSONS", "Clip", "PuppetClips", "caption", "render_clip", "split",
    "training_captions",
]  # fmt: skip
