"""Trainers, on accelerate: the autoencoder (``vae``), the text encoder (``text``), ``stage1`` and
``stage2``.

The trainers import diffusers and transformers and are imported by name.
"""

from .config import DataConfig, TrainingConfig, TrainingConfigError, read_settings

__all__ = ["DataConfig", "TrainingConfig", "TrainingConfigError", "read_settings"]
