"""Training an adapter alone: exact chunks, what decides a batch, and going on after any stop."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared_clips import write_clips
from tiny_denoiser import CONFIG, trainer

from s2dm.data.prepared import PreparedClips
from s2dm.sector import implied_prediction
from s2dm.settings import SettingsError
from s2dm.training.flow_adapter import AdapterSettings, new_adapter
from s2dm.training.trainer import TrainingError

shared_folder = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> PreparedClips:
    return write_clips(tmp_path_factory.mktemp("prepared") / "clips")


def stirred(run):
    """With weights under which every part of the adapter has a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in run.adapter.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return run


def gradients(run, step: int = 0) -> torch.Tensor:
    run.accumulate(run.batch(step))
    found = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in run.adapter.parameters()
    ]
    return torch.cat(found)


@pytest.mark.slow
@shared_folder
@given(chunk=st.integers(1, 7), frames=st.integers(0, 4), number=st.integers(1, 3))
def test_chunks_give_the_gradient_of_the_whole(
    tmp_path: Path, clips: PreparedClips, chunk: int, frames: int, number: int
) -> None:
    shape = {"frames": frames, "clips": number, "label_dropout": 0.3}
    whole = gradients(stirred(trainer(tmp_path / "a", clips, chunk=64, **shape)))
    parts = gradients(stirred(trainer(tmp_path / "b", clips, chunk=chunk, **shape)))
    assert whole.norm() > 0
    assert (whole - parts).norm() <= 1e-5 * whole.norm()


def test_seed_and_step_alone_decide_a_batch(tmp_path: Path, clips: PreparedClips) -> None:
    one = trainer(tmp_path / "a", clips)
    other = trainer(tmp_path / "b", clips, chunk=1, learning_rate=1e-2)
    other.run()
    torch.rand(3)
    for name, value in vars(one.batch(3)).items():
        assert torch.equal(value, getattr(other.batch(3), name)), name
    changed = trainer(tmp_path / "c", clips, seed=1).batch(3)
    assert not torch.equal(one.batch(3).noise, changed.noise)
    assert not torch.equal(one.batch(3).noise, one.batch(4).noise)


def test_frames_of_a_clip_share_noise_time_and_label(tmp_path: Path, clips: PreparedClips) -> None:
    batch = trainer(tmp_path / "a", clips, flow_dropout=0.5).batch(0)
    for rows in (slice(0, 3), slice(3, 6)):
        for part in (batch.noise, batch.timesteps, batch.flow_null, batch.clip_of):
            assert (part[rows] == part[rows][:1]).all()
    assert not torch.equal(batch.noise[0], batch.noise[3])


def test_labels_are_dropped_as_often_as_asked(tmp_path: Path, clips: PreparedClips) -> None:
    run = trainer(
        tmp_path / "a", clips, clips=40, frames=1,
        label_dropout=0.2, text_dropout=0.1, flow_dropout=0.3,
    )  # fmt: skip
    flow, text = [], []
    for step in range(10):
        batch = run.batch(step)
        flow.append(batch.flow_null.float())
        text.append((batch.text == clips.empty_text).flatten(1).all(1).float())
    flow, text = torch.cat(flow), torch.cat(text)
    assert abs(float(flow.mean()) - 0.5) < 0.08
    assert abs(float(text.mean()) - 0.3) < 0.08
    assert abs(float((flow * text).mean()) - 0.2) < 0.07


def test_a_new_adapter_is_the_seeds_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = new_adapter(CONFIG, 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    other, third = new_adapter(CONFIG, 3).state_dict(), new_adapter(CONFIG, 4).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["null"], third["null"])


def test_a_kind_of_prediction_that_is_not_known_is_refused(
    tmp_path: Path, clips: PreparedClips
) -> None:
    with pytest.raises(TrainingError, match="flow_matching"):
        trainer(tmp_path / "a", clips, kind="flow_matching")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_who_knows_the_clip_has_no_loss_and_samples_it(
    tmp_path: Path, clips: PreparedClips, kind: str
) -> None:
    run = trainer(tmp_path / "a", clips, kind=kind)
    batch = run.batch(0)

    def knowing(latents: torch.Tensor) -> Callable[..., torch.Tensor]:
        def predict(x_t: torch.Tensor, t: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
            alpha_bar = run.denoiser.alpha_bars[t]
            return implied_prediction(latents[: len(x_t)], x_t, alpha_bar, kind)

        return predict

    run.denoiser = dataclasses.replace(run.denoiser, predict=knowing(batch.latents))
    assert float(run.loss(batch, slice(0, len(batch.latents)))) < 1e-5
    latents = batch.latents[:1].expand(2, -1, -1, -1)
    run.denoiser = dataclasses.replace(run.denoiser, predict=knowing(latents))
    made = run.sample(num_frames=2, steps=3)
    torch.testing.assert_close(made, latents, rtol=1e-3, atol=1e-3)


class StopError(Exception):
    pass


def uninterrupted(folder: Path, prepared: PreparedClips, /, **values):
    run = trainer(folder, prepared, **values)
    run.run()
    return run


def assert_same(one, other) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-6)
    for name, weight in one.averaged_state("adapter").items():
        assert torch.allclose(
            weight, other.averaged_state("adapter")[name], rtol=1e-5, atol=1e-7
        ), name


@pytest.mark.slow
@shared_folder
@given(chunks=st.integers(1, 17))
def test_cancelled_anywhere_it_goes_on_as_if_it_never_was(
    tmp_path: Path, clips: PreparedClips, chunks: int
) -> None:
    seen = []

    def between() -> None:
        seen.append(1)
        if len(seen) == chunks:
            raise StopError

    whole = uninterrupted(tmp_path / f"whole{chunks}", clips, resume=False)
    stopped = trainer(tmp_path / "run", clips, between=between, resume=False)
    with pytest.raises(StopError):
        stopped.run()
    assert all(p.grad is None for p in stopped.adapter.parameters())
    gone_on = uninterrupted(tmp_path / "run", clips)
    assert_same(gone_on, whole)


@pytest.mark.slow
def test_killed_it_goes_on_from_what_was_saved(tmp_path: Path, clips: PreparedClips) -> None:
    whole = uninterrupted(tmp_path / "whole", clips)
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from s2dm.data.prepared import PreparedClips
from s2dm.sector import implied_prediction
from tiny_denoiser import trainer
from pathlib import Path
def kill(run):
    if run.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
trainer(Path({str(tmp_path / "run")!r}), PreparedClips({str(clips.folder)!r})).run(kill)
"""
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    gone_on = trainer(tmp_path / "run", clips)
    assert gone_on.step == 4  # of five; saved every second
    gone_on.run()
    assert_same(gone_on, whole)


def test_a_full_disk_keeps_the_last_state_and_says_what_to_do(
    tmp_path: Path, clips: PreparedClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    whole = uninterrupted(tmp_path / "whole", clips)
    real, written = safetensors.torch.save_file, []

    def full(*args, **kwargs):
        written.append(1)
        if len(written) > 1:
            Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TrainingError, match=r"No space left.*Make room"):
        trainer(tmp_path / "run", clips).run()
    monkeypatch.undo()
    gone_on = trainer(tmp_path / "run", clips)
    assert gone_on.step == 2
    gone_on.run()
    assert_same(gone_on, whole)


def test_a_run_can_be_made_longer(tmp_path: Path, clips: PreparedClips) -> None:
    whole = uninterrupted(tmp_path / "whole", clips)
    uninterrupted(tmp_path / "run", clips, steps=3)
    assert_same(uninterrupted(tmp_path / "run", clips), whole)


def test_not_resuming_starts_anew(tmp_path: Path, clips: PreparedClips) -> None:
    uninterrupted(tmp_path / "run", clips)
    assert trainer(tmp_path / "run", clips, resume=False, learning_rate=1.0).step == 0


@pytest.mark.parametrize(
    "changed", [{"learning_rate": 1e-2}, {"clips": 1}, {"frames": 1}], ids=lambda c: next(iter(c))
)
def test_a_run_with_other_settings_is_not_gone_on_with(
    tmp_path: Path, clips: PreparedClips, changed: dict
) -> None:
    uninterrupted(tmp_path / "run", clips)
    with pytest.raises(TrainingError, match=f"another {next(iter(changed))}"):
        trainer(tmp_path / "run", clips, **changed)


def test_other_clips_are_not_gone_on_with(tmp_path: Path, clips: PreparedClips) -> None:
    uninterrupted(tmp_path / "run", clips)
    with pytest.raises(TrainingError, match="another clips"):
        trainer(tmp_path / "run", write_clips(tmp_path / "other", count=2))


def test_a_damaged_state_is_named(tmp_path: Path, clips: PreparedClips) -> None:
    uninterrupted(tmp_path / "run", clips)
    (tmp_path / "run" / "state.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(TrainingError, match=r"state\.safetensors.*don't resume"):
        trainer(tmp_path / "run", clips)


def test_what_diverged_is_not_saved(tmp_path: Path, clips: PreparedClips) -> None:
    run = trainer(tmp_path / "run", clips, steps=50)

    def break_it(run) -> None:
        if run.step == 3:
            with torch.no_grad():
                run.adapter.null.fill_(torch.inf)
                run.adapter.encoder.position.fill_(torch.nan)

    with pytest.raises(TrainingError, match="Lower the learning rate"):
        run.run(break_it)
    assert trainer(tmp_path / "run", clips, steps=50).step == 2


def test_a_preview_is_finite_and_the_weights_stay(tmp_path: Path, clips: PreparedClips) -> None:
    run = uninterrupted(tmp_path / "run", clips)
    before = {name: weight.clone() for name, weight in run.adapter.state_dict().items()}
    latents = run.sample(num_frames=3, steps=4)
    assert latents.shape == (3, *clips.latent_shape)
    assert latents.isfinite().all()
    after = run.adapter.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"frames": -1}, {"noise_sharing": "none"}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        AdapterSettings(**wrong)
