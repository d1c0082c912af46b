"""In which numbers a training computes, by what the device can do."""

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, DistributedType

from s2dm.training import TrainingConfig
from s2dm.training.loop import make_accelerator
from s2dm.training.precision import MIXED_PRECISION, precision_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def processor(monkeypatch, **known):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "no"),
        ({"architecture": "aarch64"}, "no"),
    ],
)
def test_a_processor_computes_in_bfloat16_only_where_it_has_instructions_for_it(
    monkeypatch, known, chosen
):
    processor(monkeypatch, **known)
    assert precision_on(CPU, "auto") == chosen


def test_a_pytorch_that_knows_no_processor_takes_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision_on(CPU, "auto") == "no"


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "bf16"), ((7, 5), "no")])
def test_a_gpu_that_would_only_imitate_bfloat16_does_not(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_on(CUDA, "auto") == chosen


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("named", sorted(set(MIXED_PRECISION) - {"auto"}))
def test_what_is_named_is_done(device, named):
    assert precision_on(device, named) == named


@pytest.fixture
def no_state():
    """accelerate keeps what it finds out for the rest of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("can", "chosen"), [(True, "bf16"), (False, "no")])
def test_a_training_computes_as_its_device_can(monkeypatch, no_state, can, chosen):
    processor(monkeypatch, amx_bf16=can)
    assert make_accelerator(TrainingConfig()).mixed_precision == chosen


def test_processes_that_are_to_use_the_cpu_train_together(monkeypatch, no_state):
    """Asking for the device first must not make a training of its own of each process."""
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "ACCELERATE_USE_CPU": "true"}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    accelerator = make_accelerator(TrainingConfig())
    try:
        assert accelerator.distributed_type == DistributedType.MULTI_CPU
        assert accelerator.device.type == "cpu"
    finally:
        accelerator.end_training()
