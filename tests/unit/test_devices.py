"""Steps of trainers and of sampling as a GPU would see them: fake tensors know their device and
hold nothing.

An operation on tensors of two devices fails on them as it does on a GPU, which isn't needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from random_checkpoint import TINY, write_random_checkpoint
from tiny_training import data_config, stage2_config, vae_config

from s2dm.sector import implied_prediction, predicted_x0
from s2dm.settings import from_dict
from s2dm.training.loop import step_generator
from s2dm.training.stage1 import Stage1TrainingConfig, build_stage1_task
from s2dm.training.stage2 import build_stage2_task
from s2dm.training.text import TextTrainingConfig, build_text_task
from s2dm.training.vae import build_vae_task

pytestmark = pytest.mark.usefixtures("tiny_preset")

CPU = torch.device("cpu")


def vae_task(folder, vae_file):
    return build_vae_task(vae_config(folder, guide_steps=2))


def stage2_task(folder, vae_file):
    return build_stage2_task(stage2_config(folder, vae_file, train=["unet", "flow_adapter"]), CPU)


def decoder_task(folder, vae_file):
    """With the adversarial loss, past the steps that the discriminator learns alone."""
    return build_vae_task(vae_config(folder, checkpoint=str(vae_file), adversarial_weight=0.1))


def text_task(folder, vae_file, **settings):
    return build_text_task(
        from_dict(
            TextTrainingConfig,
            {
                "output": str(folder),
                "preset": "tiny",
                "data": data_config().__dict__,
                "workers": 0,
                **settings,
            },
        )
    )


def text_task_that_keeps_its_states(folder, vae_file):
    start = write_random_checkpoint(folder / "start.safetensors", TINY)
    return text_task(folder, vae_file, checkpoint=str(start), keep_weight=1.0)


def stage1_task(folder, vae_file):
    start = write_random_checkpoint(folder / "start.safetensors", TINY)
    return build_stage1_task(
        from_dict(
            Stage1TrainingConfig,
            {
                "output": str(folder / "run"),
                "checkpoint": str(start),
                "data": data_config().__dict__,
                "workers": 0,
                "clips": 2,
            },
        ),
        CPU,
    )


def on_the_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def move(module: torch.nn.Module) -> torch.nn.Module:
    """Put fake weights and buffers on a GPU in place of the real ones."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(
                    on_the_gpu(weight), weight.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_the_gpu(buffer)
    return module


@pytest.mark.parametrize(
    "build",
    [
        vae_task,
        decoder_task,
        text_task,
        text_task_that_keeps_its_states,
        stage1_task,
        stage2_task,
    ],
)
def test_a_training_step_stays_on_the_gpu(
    build: Callable[..., Any], tmp_path, vae_file, monkeypatch
):
    # The adversarial loss compares two gradients, for which autograd asks for a real GPU.
    monkeypatch.setattr(torch.autograd, "grad", lambda one, weight, **_: (weight.detach(),))
    task = build(tmp_path, vae_file)
    batch = task.batch(step_generator(0, 0), CPU)
    with FakeTensorMode():
        batch = {name: on_the_gpu(value) for name, value in batch.items()}
        losses = move(task.model).train()(batch)
    assert {loss.device.type for loss in losses.values()} == {"cuda"}


def test_a_level_of_its_own_follows_the_latents_to_the_gpu():
    """As an anchor has it: the clean sample of one step, whose level is a number."""
    level = torch.tensor(0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        latents = torch.empty(2, 4, 8, 8, device="cuda")
        known = (latents, level, "v_prediction")
        pulled = implied_prediction(predicted_x0(latents, *known), *known)
    assert pulled.device.type == "cuda"
