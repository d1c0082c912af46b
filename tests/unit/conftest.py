"""What several tests of the library share. The heavy imports wait for the first who asks."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of both stages with random weights, which tests read and never change."""
    from random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_preset() -> Iterator[None]:
    """The preset `tiny`: stage 2 alone, its tokenizer not trained yet."""
    from random_checkpoint import tiny_config

    from s2dm.models import presets

    with pytest.MonkeyPatch.context() as patch:
        config = tiny_config(flow_generator=None, tokenizer=None)
        patch.setattr(presets, "TINY", config, raising=False)
        yield


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory: pytest.TempPathFactory, tiny_preset: None) -> Path:
    """A VAE of the tiny preset, trained on the squares for two steps."""
    from tiny_training import vae_config

    from s2dm.training.vae import train_vae

    folder = tmp_path_factory.mktemp("vae")
    train_vae(vae_config(folder, steps=2))
    return folder / "export.safetensors"
