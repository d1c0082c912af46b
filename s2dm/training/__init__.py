"""Trainers, on accelerate: the autoencoder (`vae`), the text encoder (`text`), `stage1`,
`stage2` and the region-motion model (`region_motion`).

The trainers import diffusers and transformers and are imported by name.
"""

from ..data import DataConfig
from ..settings import SettingsError, read_settings
from .config import TrainingConfig

__all__ = ["DataConfig", "SettingsError", "TrainingConfig", "read_settings"]
