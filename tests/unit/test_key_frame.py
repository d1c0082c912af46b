"""The frame that moves most, drawn before frame 1, so that frame 1 shows who stands where."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm.flow import FlowField
from s2dm.flow.inverse import key_frame, rebase
from s2dm.pipelines import FlowToVideoPipeline, flow_to_video
from s2dm.pipelines.denoiser import Denoiser
from s2dm.sector import Anchor, NoiseSharing

PROMPT = "A man wearing a red coat and blue jeans is squat"
STEPS, KEY = 4, 2
ANCHORED = {"steps": STEPS, "flow_start": 0.25, "anchor_end": 1.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> FlowToVideoPipeline:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_random_checkpoint(path, tiny_config(flow_generator=None))
    made = FlowToVideoPipeline.from_single_file(path)
    made.set_progress_bar_config(disable=True)
    return made


def there_and_back(size: int = 48) -> FlowField:
    """Four frames whose left half goes to the right; in frame 3 it is furthest."""
    displacement = torch.zeros(4, 2, size, size)
    furthest = -size / 6 * torch.tensor([0, 0.5, 1, 0.25])
    displacement[:, 0, :, : size // 2] = furthest.view(-1, 1, 1)
    return FlowField(displacement, torch.zeros(4, 1, size, size))


def drawn(pipeline, flow, key=True, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The clip's latents, and those after each step."""
    seen: list[torch.Tensor] = []
    sampling = {**ANCHORED, "key_frame": key, **options.pop("sampling", {})}
    clip = pipeline(
        PROMPT,
        flow,
        sampling=sampling,
        seed=1,
        output_type="latent",
        callback_on_step_end=lambda number, latents: (
            seen.append(latents) if number == len(seen) else pytest.fail(f"step {number}")
        ),
        **options,
    ).frames
    return clip, seen


def test_it_is_the_frame_that_moves_most():
    flow = there_and_back()
    assert key_frame(flow) == KEY
    assert key_frame(FlowField.zeros(3, 8, 8)) == 0
    # What nobody sees doesn't count.
    flow.occlusion[KEY, :, :, 6:24] = 1
    assert key_frame(flow) == 1
    flow.occlusion[1:, :, :, :24] = 1
    assert key_frame(flow) == 0


def test_key_frame_then_frame_1_then_the_clip(pipeline):
    clip, seen = drawn(pipeline, there_and_back())
    assert [len(latents) for latents in seen] == [1] * 2 * STEPS + [4] * STEPS
    without, seen = drawn(pipeline, there_and_back(), key=False)
    assert [len(latents) for latents in seen] == [1] * STEPS + [4] * STEPS
    assert relative(clip, without) > 0.05


@pytest.mark.parametrize("noise", ["shared", "mixed"])
@pytest.mark.parametrize("size", [48, 96])
def test_the_key_frame_sees_its_own_flow_from_the_very_start(pipeline, noise, size):
    """And is drawn from its own noise, as in a clip that isn't anchored."""
    options = {"noise_sharing": NoiseSharing(noise), "height": 48, "width": 48}
    flow = there_and_back(size)
    _, seen = drawn(pipeline, flow, **options)
    plain = {"anchor_end": 0.0, "flow_start": 0.0}
    expected, _ = drawn(pipeline, flow, sampling=plain, **options)
    assert relative(seen[STEPS - 1], expected[KEY : KEY + 1]) < 1e-5
    late, _ = drawn(pipeline, flow, sampling={"anchor_end": 0.0}, **options)
    assert relative(seen[STEPS - 1], late[KEY : KEY + 1]) > 1e-4


@torch.no_grad()
def test_frame_1_is_anchored_to_the_key_frame_and_the_clip_to_frame_1(pipeline, monkeypatch):
    anchors = []

    def noted(*arguments):
        anchors.append(arguments[-1])
        return Denoiser(*arguments)

    def encode(frames):
        latents = pipeline.vae.encode(frames * 2 - 1).latent_dist.mode()
        return latents * pipeline.vae.config.scaling_factor

    monkeypatch.setattr(flow_to_video, "Denoiser", noted)
    flow = there_and_back()
    clip, seen = drawn(pipeline, flow)
    key, first = (pipeline.decode_latents(seen[n * STEPS - 1]) for n in (1, 2))
    assert anchors[0] is None
    moved = Anchor.of(key, rebase(flow, [KEY, 0]), encode)
    assert relative(anchors[1].latents, moved.latents[1:]) < 1e-6
    assert relative(anchors[1].latents, moved.latents[:1]) > 0.05
    assert torch.equal(anchors[1].shown, moved.shown[1:])
    assert torch.equal(anchors[1].still, moved.still[1:])
    assert relative(anchors[2].latents, Anchor.of(first, flow, encode).latents) < 1e-6
    given, _ = drawn(pipeline, flow, reference=first[0])
    assert relative(given, clip) < 1e-5


def test_where_nothing_moves_no_bit_changes(pipeline):
    flow = FlowField.zeros(3, 32, 32)
    clip, seen = drawn(pipeline, flow)
    assert len(seen) == 2 * STEPS
    assert torch.equal(clip, drawn(pipeline, flow, key=False)[0])


@pytest.mark.parametrize("case", ["a reference", "no anchor"])
def test_where_frame_1_is_not_drawn_no_bit_changes(pipeline, case):
    options = {"reference": torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))}
    if case == "no anchor":
        options = {"sampling": {"anchor_end": 0.0}}
    clip, seen = drawn(pipeline, there_and_back(), **options)
    assert len(seen) == STEPS
    assert torch.equal(clip, drawn(pipeline, there_and_back(), key=False, **options)[0])


def test_chunks_change_nothing(pipeline):
    whole, _ = drawn(pipeline, there_and_back(), chunk_size=8)
    assert relative(drawn(pipeline, there_and_back(), chunk_size=1)[0], whole) < 1e-5


def test_sizes_between_cells(pipeline):
    clip, _ = drawn(pipeline, there_and_back(), height=44, width=60)
    assert clip.shape == (4, 4, 6, 8)
    assert clip.isfinite().all()
