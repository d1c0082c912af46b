"""Data sets of clips. `puppets`: drawn people with exact flow; `videos`: a folder of clips;
`mhad` and `mug`: UTD-MHAD and MUG as they are published."""

from .clip import Clip, Garment
from .sets import ClipDataset, DataConfig, build_dataset, held_out_clips, register_dataset

__all__ = [
    "Clip", "ClipDataset", "DataConfig", "Garment", "build_dataset", "held_out_clips",
    "register_dataset",
]  # fmt: skip
