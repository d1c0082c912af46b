"""Data sets. `puppets`: procedural people with exact optical flow; `videos`: a folder of clips."""

from .puppets import (
    ACTIONS,
    PERSONS,
    Clip,
    PuppetClips,
    caption,
    render_clip,
    split,
)
from .videos import VideoClip, VideoClips

__all__ = [
    "ACTIONS", "PERSONS", "Clip", "PuppetClips", "VideoClip", "VideoClips", "caption",
    "render_clip", "split",
]  # fmt: skip
