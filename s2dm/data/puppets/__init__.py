"""Procedural people with exact optical flow, doing the 27 actions of UTD-MHAD."""

from .actions import ACTIONS
from .captions import caption
from .dataset import PuppetClips, split
from .persons import PERSONS, Person
from .render import render_clip

__all__ = [
    "ACTIONS", "PERSONS", "Person", "PuppetClips", "caption", "render_clip", "split",
]  # fmt: skip
