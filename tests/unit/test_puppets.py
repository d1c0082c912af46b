"""The procedural puppets: exact flow, honest captions, splits that hold nothing twice."""

import colorsys
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.data.puppets import (
    ACTIONS,
    PERSONS,
    PuppetClips,
    caption,
    render_clip,
    split,
)
from s2dm.data.puppets.actions import poses
from s2dm.data.puppets.persons import TOP_COLOURS, TROUSER_COLOURS

clips = st.tuples(
    st.integers(0, len(PERSONS) - 1), st.integers(0, len(ACTIONS) - 1), st.integers(0, 999)
)


def _visible(clip):
    """Pixels well away from any occlusion."""
    near = torch.nn.functional.max_pool2d(clip.flow.occlusion, 3, stride=1, padding=1)
    return near == 0


def _moving(clip):
    speed = clip.flow.displacement.norm(dim=1, keepdim=True)
    return speed > 1


@settings(max_examples=6, deadline=None)
@given(clips)
def test_flow_carries_frame_1_onto_every_frame(which):
    clip = render_clip(*which, frames=6)
    error = (clip.flow.warp(clip.frames[:1]) - clip.frames).abs().mean(1, keepdim=True) * 255
    visible = _visible(clip)
    assert error[visible].mean() < 2
    # The same measure fails for a flow of zero, and where the occlusion says so.
    still = (clip.frames[:1] - clip.frames).abs().mean(1, keepdim=True) * 255
    moving = visible & _moving(clip)
    assert error[moving].mean() < 0.5 * still[moving].mean()
    assert error[clip.flow.occlusion == 1].mean() > 4 * error[visible].mean()


@settings(max_examples=4, deadline=None)
@given(clips)
def test_background_stands_still(which):
    clip = render_clip(*which, frames=5)
    assert 0.3 < clip.still.float().mean() < 0.95
    background = clip.still.expand(5, 3, -1, -1)
    assert torch.equal(clip.frames[background], clip.frames[:1].expand(5, -1, -1, -1)[background])
    assert clip.flow.displacement[clip.still.expand(5, 2, -1, -1)].abs().max() == 0
    assert clip.flow.occlusion[clip.still.expand(5, 1, -1, -1)].max() == 0


def test_frame_1_has_no_motion_and_later_frames_have():
    clip = render_clip(4, 2, 0)
    assert clip.flow.displacement[0].abs().max() == 0
    assert clip.flow.occlusion[0].max() == 0
    assert set(clip.flow.occlusion.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("action", range(len(ACTIONS)), ids=[a.name for a in ACTIONS])
def test_every_action_moves_visibly_and_within_reach(action):
    clip = render_clip(action % len(PERSONS), action, 0, frames=9)
    speed = clip.flow.displacement.norm(dim=1)
    assert speed.amax(dim=(1, 2)).max() > 5  # pixels
    assert speed[speed > 1].mean() < 14
    assert (speed > 1).float().mean() > 0.02
    assert clip.frames.min() >= 0
    assert clip.frames.max() <= 1


def test_a_clip_is_fixed_by_its_numbers():
    first, again, other = (render_clip(3, 5, take, frames=3) for take in (7, 7, 8))
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.flow.displacement, again.flow.displacement)
    assert first.caption == other.caption
    assert (first.frames - other.frames).abs().mean() > 0.02


@pytest.mark.parametrize("action", range(len(ACTIONS)), ids=[a.name for a in ACTIONS])
def test_the_amplitude_sizes_the_movement_and_leaves_frame_1_alone(action):
    numbers = (action % len(PERSONS), action, 0, 64, 6)
    none, half, usual, more = (render_clip(*numbers, amplitude=a) for a in (0, 0.5, 1, 1.5))
    assert none.flow.displacement.abs().max() < 1e-4
    motion = [clip.flow.magnitude().mean() for clip in (half, usual, more)]
    assert 0.4 < motion[0] / motion[1] < 0.6
    assert 1.2 < motion[2] / motion[1] < 1.8
    assert torch.equal(half.frames[0], more.frames[0])
    assert torch.equal(usual.frames, render_clip(*numbers).frames)


@pytest.mark.parametrize(("size", "frames"), [(128, 1), (96, 17), (64, 2), (200, 3)])
def test_any_size_and_number_of_frames(size, frames):
    clip = render_clip(0, 26, 1, size=size, frames=frames)
    assert clip.frames.shape == (frames, 3, size, size)
    assert clip.frames.dtype == torch.float32
    assert clip.flow.displacement.shape == (frames, 2, size, size)
    assert clip.flow.occlusion.shape == (frames, 1, size, size)
    assert clip.still.shape == (1, 1, size, size)


def test_flow_grows_with_the_picture():
    small, large = (render_clip(6, 26, 2, size=size, frames=3) for size in (64, 128))
    ratio = large.flow.displacement.abs().mean() / small.flow.displacement.abs().mean()
    assert ratio == pytest.approx(2, rel=0.05)


def test_the_first_frames_do_not_depend_on_how_many_follow():
    short, long = render_clip(1, 1, 1, frames=1), render_clip(1, 1, 1, frames=4)
    assert torch.equal(short.frames[0], long.frames[0])


@pytest.mark.parametrize(
    "arguments",
    [
        (24, 0, 0), (-1, 0, 0), (0, 27, 0), (0, 0, -1), (0, 0, 0, 4), (0, 0, 0, 64, 0),
        (0, 0, 0, 64, 2, -0.1),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected"):
        render_clip(*arguments)


def test_captions_follow_the_grammar_of_the_paper():
    grammar = re.compile(
        r"A (man|woman)( with glasses)?, wearing an? (\w+) ([\w-]+) and (\w+) (\w+) is ([\w ]+)"
    )
    words = [grammar.fullmatch(caption(p, a)) for p in range(len(PERSONS)) for a in range(27)]
    assert all(words)
    assert len({match.string for match in words}) == len(words)  # every person can be told apart
    assert len({match[7] for match in words}) == 27


def test_every_colour_is_worn_by_several_persons():
    tops = [person.top_colour for person in PERSONS]
    trousers = [person.trousers_colour for person in PERSONS]
    assert len(PERSONS) >= 24
    assert all(tops.count(colour) >= 3 for colour in TOP_COLOURS)
    assert all(trousers.count(colour) >= 3 for colour in TROUSER_COLOURS)


@pytest.mark.parametrize("person", range(len(PERSONS)))
def test_the_named_colour_is_what_is_seen(person):
    """Hue, or for black and white lightness, of the trunk; shading changes neither."""
    clip = render_clip(person, 24, 0, frames=1)  # stands frontally, arms hanging
    rows, columns = (~clip.still[0, 0]).nonzero(as_tuple=True)
    middle = int(columns.float().mean())
    top = int(rows.min() + 0.42 * (rows.max() - rows.min()))
    patch = clip.frames[0, :, top : top + 12, middle - 5 : middle + 6].flatten(1).T.numpy()
    seen = [_name(*pixel) for pixel in patch]
    assert max(set(seen), key=seen.count) == PERSONS[person].top_colour


def _name(red, green, blue):
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.25:
        return "white" if value > 0.5 else "black"
    hues = {
        name: colorsys.rgb_to_hsv(*colour)[0]
        for name, colour in TOP_COLOURS.items()
        if name not in ("black", "white")
    }
    return min(hues, key=lambda name: abs((hue - hues[name] + 0.5) % 1 - 0.5))


def test_amplitude_scales_the_departure_from_the_first_pose():
    action, time = ACTIONS[2], np.linspace(0, 1, 7)
    whole, half = poses(action, time), poses(action, time, amplitude=0.5)
    for name in whole:
        start = whole[name][:1]
        np.testing.assert_allclose(half[name] - start, 0.5 * (whole[name] - start), atol=1e-12)


def test_circles_turn_opposite_ways():
    names = [action.name for action in ACTIONS]

    def area(name):
        hand = poses(ACTIONS[names.index(name)], np.linspace(0, 1, 64))["rh"]
        x, y = -hand[:, 0], hand[:, 1]  # image right, up
        return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)

    assert area("draw circle clockwise") < -0.05
    assert area("draw circle counter clockwise") > 0.05


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_split_covers_everyone_in_both_parts(seed):
    train, test = split("train", seed), split("test", seed)
    everything = len(PERSONS) * len(ACTIONS)
    assert not set(train) & set(test)
    assert len(train) + len(test) == everything
    assert len(test) == pytest.approx(0.1 * everything, abs=1)
    for part in (train, test):
        assert {person for person, _ in part} == set(range(len(PERSONS)))
        assert {action for _, action in part} == set(range(len(ACTIONS)))
    assert split("test", seed) == test


def test_splits_depend_on_the_seed_and_refuse_other_names():
    assert split("test", 0) != split("test", 1)
    with pytest.raises(ValueError, match='"train" or "test"'):
        split("validation")


def test_data_set_runs_through_combinations_and_takes():
    clips = PuppetClips("test", takes=2, first_take=5, size=32, frames=2)
    pairs = split("test")
    assert len(clips) == 2 * len(pairs)
    for index, take in ((3, 5), (3 + len(pairs), 6)):
        expected = render_clip(*pairs[3], take, size=32, frames=2)
        assert torch.equal(clips[index].frames, expected.frames)
        assert clips[index].caption == caption(*pairs[3])
    with pytest.raises(IndexError):
        clips[len(clips)]
    with pytest.raises(ValueError, match="at least 1 take"):
        PuppetClips("test", takes=0)


def test_takes_have_their_amplitudes_in_turn():
    clips = PuppetClips("test", takes=3, first_take=7, size=32, frames=3, amplitudes=[1, 0.5])
    pairs = split("test")
    for number, amplitude in enumerate((1, 0.5, 1)):
        expected = render_clip(*pairs[2], 7 + number, 32, 3, amplitude)
        assert torch.equal(clips[2 + number * len(pairs)].frames, expected.frames)
    for wrong in ([], [1, -0.5]):
        with pytest.raises(ValueError, match="amplitudes"):
            PuppetClips("test", amplitudes=wrong)
