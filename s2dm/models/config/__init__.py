"""Sizes and settings of every part of a checkpoint, as frozen dataclasses.

The names follow the `ldm` code base of Stable Diffusion 1.x, because the file keeps its
keys. All configs turn into plain JSON (`to_dict`) and back (`from_dict`), which checks
names and values so that a broken file is refused in plain words.
"""
