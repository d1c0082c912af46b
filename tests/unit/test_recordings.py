"""UTD-MHAD and MUG in the layout they are published in: what is found, held out, said and read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("diffusers")

from s2dm.data import DataConfig, build_dataset
from s2dm.data.combinations import hold_out
from s2dm.data.mhad import PROTOCOL as MHAD
from s2dm.data.mhad import find_mhad
from s2dm.data.mug import EXPRESSIONS
from s2dm.data.mug import PROTOCOL as MUG
from s2dm.data.recordings import TABLES, RecordedClips, Words, framed
from s2dm.data.sampling import one_of_each_interval, some_of_each_interval
from s2dm.settings import SettingsError
from s2dm.training.cache import ClipCache, build_clip_cache
from s2dm.video import write_clip

MISSING = {"a8_s1_t4", "a23_s6_t4", "a27_s8_t4"}


def mhad_names() -> list[str]:
    """All 861 of the real data set."""
    names = [
        f"a{action}_s{subject}_t{trial}"
        for action in range(1, 28)
        for subject in range(1, 9)
        for trial in range(1, 5)
    ]
    return [name for name in names if name not in MISSING]


@pytest.fixture(scope="module")
def mhad(tmp_path_factory) -> Path:
    """Every name of UTD-MHAD's RGB videos, in the folders of its archives; empty files."""
    folder = tmp_path_factory.mktemp("UTD-MHAD")
    for name in mhad_names():
        part = folder / f"RGB-part{1 + (int(name.split('_')[0][1:]) - 1) // 7}"
        part.mkdir(exist_ok=True)
        (part / f"{name}_color.avi").touch()
    (folder / "Depth").mkdir()
    (folder / "Depth" / "a1_s1_t1_depth.mat").touch()
    return folder


@pytest.fixture(scope="module")
def mug(tmp_path_factory) -> Path:
    """52 subjects with 7 expressions in 1009 takes, three subjects with sessions; empty pictures.

    Which subject has how many takes is not public: here from one to five.
    """
    folder = tmp_path_factory.mktemp("MUG")
    subjects = list(Words.read(TABLES / "mug.toml").persons)
    count, combination = 0, 0
    for subject in subjects:
        for expression in EXPRESSIONS:
            takes = 1 + combination % 4 + (combination < 1009 - 910)  # 1009 together
            combination += 1
            for take in range(takes):
                session = f"session{take % 2}" if subject in ("002", "003", "049") else ""
                path = folder / "subjects3" / subject / session / expression / f"take{take:03d}"
                path.mkdir(parents=True)
                for frame in range(2):
                    (path / f"img_{frame:04d}.jpg").touch()
                count += 1
    assert count == MUG.recordings
    return folder


def clips(name: str, folder: Path, split: str, **options) -> RecordedClips:
    config = DataConfig(name=name, size=32, frames=4, options={"folder": str(folder), **options})
    return build_dataset(config, split)


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_mhad_is_split_as_in_the_paper(mhad, seed):
    train, test = (clips("mhad", mhad, split, seed=seed) for split in ("train", "test"))
    assert (len(train), len(test)) == (777, 84)
    combinations = [{one.combination for one in part.recordings} for part in (train, test)]
    assert len(combinations[1]) == MHAD.held_out_combinations == 21
    assert len(combinations[0]) == 216 - 21 and not combinations[0] & combinations[1]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_mug_is_split_as_in_the_paper(mug, seed):
    train, test = (clips("mug", mug, split, seed=seed) for split in ("train", "test"))
    assert (len(train), len(test)) == (931, 78)
    combinations = [{one.combination for one in part.recordings} for part in (train, test)]
    assert len(combinations[1]) == 36 and len(combinations[0]) == 364 - 36
    assert not combinations[0] & combinations[1]


def test_every_person_and_action_is_in_training_too(mhad, mug):
    """With the seed that is the default."""
    for name, folder in (("mhad", mhad), ("mug", mug)):
        train, test = (clips(name, folder, split) for split in ("train", "test"))
        for field in ("person", "action"):
            seen = {getattr(one, field) for one in train.recordings}
            assert {getattr(one, field) for one in test.recordings} <= seen


def test_the_split_is_that_of_its_seed(mhad):
    first, again, other = (clips("mhad", mhad, "test", seed=s).held_out for s in (0, 0, 1))
    assert first == again != other
    # Recorded on the page: the same on every machine and in every version.
    page = (Path(__file__).parents[2] / "docs" / "reproduction.md").read_text("utf-8")
    (told,) = re.findall(r"UTD-MHAD's are: ([\d/, ]+) \(person/action\)", page)
    assert first == {tuple(pair.split("/")) for pair in told.split(", ")}


def test_held_out_sets_are_drawn_evenly():
    """All sets of two combinations with three clips, equally often."""
    counts = {"a": 1, "b": 2, "c": 2, "d": 1, "e": 3}
    drawn = [frozenset(hold_out(counts, 2, 3, seed)) for seed in range(2000)]
    expected = {frozenset(pair) for pair in ("ab", "ac", "bd", "cd")}
    assert set(drawn) == expected
    for pair in expected:
        assert drawn.count(pair) == pytest.approx(500, abs=80)
    assert {len(hold_out(counts, 2, 0, seed)) for seed in range(20)} == {2}
    with pytest.raises(ValueError, match="no 2 of 5 combinations have 9 clips"):
        hold_out(counts, 2, 9, 0)


def test_captions_are_in_the_papers_grammar(mhad, tmp_path):
    table = tmp_path / "mine.toml"
    text = (TABLES / "mhad.toml").read_text("utf-8")
    looks = "A man with glasses, wearing a black coat and blue jeans"
    table.write_text(text.replace('"A man, person 1"', f'"{looks}"'), "utf-8")
    train = clips("mhad", mhad, "train", table=str(table))
    captions = {train.caption(index) for index in range(len(train))}
    assert {f"{looks} is squat", f"{looks} is tennis forehand swing"} <= captions
    assert train.labels(0) == {"class": "1", "subject": "1"}
    assert train.fingerprint != clips("mhad", mhad, "train").fingerprint
    table.write_text(text.replace("27 =", "28 ="), "utf-8")
    with pytest.raises(SettingsError, match=re.escape("no word for '27' in [actions]")):
        clips("mhad", mhad, "train", table=str(table))


def test_an_incomplete_copy_is_told_and_can_be_split(tmp_path, caplog):
    for name in mhad_names()[:60]:
        (tmp_path / f"{name}_color.avi").touch()
    with pytest.raises(ValueError, match="from 1 to 14 of 15 combinations, got 21"):
        clips("mhad", tmp_path, "test")
    test = clips("mhad", tmp_path, "test", held_out_combinations=3, held_out_clips=0)
    assert 3 <= len(test) <= 12 and "60 of 15" in caplog.text
    with pytest.raises(SettingsError, match="no RGB videos of UTD-MHAD"):
        find_mhad(tmp_path / "nothing")


# ----------------------------------------------------------------------------------- reading


def test_one_frame_is_drawn_of_each_of_equal_intervals():
    draws = [one_of_each_interval(4, take)([None] * 20) for take in range(300)]
    for place in range(4):
        assert {draw[place] for draw in draws} == set(range(5 * place, 5 * place + 5))
    assert draws[3] == one_of_each_interval(4, 3)([None] * 20)
    # Fewer frames than intervals, or as many as don't divide: still in order and in range.
    assert one_of_each_interval(4, 0)([None] * 2) == [0, 0, 1, 1]
    for take in range(50):
        draw = one_of_each_interval(16, take)([None] * 33)
        assert draw == sorted(draw) and len(set(draw)) == 16 and draw[-1] <= 32


def test_a_pool_holds_its_draws():
    """One first frame, and distinct frames of each later interval, as far as there are any."""
    for take in range(50):
        pool = some_of_each_interval(4, 3, take)([None] * 20)
        assert len(pool) == 10 and pool == sorted(pool) and len(set(pool)) == 10
        assert pool[0] == one_of_each_interval(4, take)([None] * 20)[0]
        for place in range(1, 4):
            assert {number // 5 for number in pool[3 * place - 2 : 3 * place + 1]} == {place}
    whole = some_of_each_interval(4, 5, 0)([None] * 20)
    assert whole[1:] == [*range(5, 20)]
    assert some_of_each_interval(3, 2, 0)([None] * 3) == [0, 1, 1, 2, 2]


def test_a_window_of_a_frame_stays_whole():
    frame = torch.zeros(3, 480, 640)
    frame[:, :, 156:492] = 1
    square = framed(frame, 128, (156 / 640, 0, 492 / 640, 1))
    assert square.shape == (3, 128, 128)
    columns = square[0].amin(0)
    assert (columns > 0.99).sum() == 90 and columns[:19].max() == 0 == columns[-19:].max()
    assert framed(torch.ones(3, 40, 40), 8).min() > 0.999


def write_mhad(folder: Path, subjects: int = 2, actions: int = 3, trials: int = 2) -> Path:
    """A textured square that moves, in UTD-MHAD's format; frame k is brighter than frame k - 1."""
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(1, 3, 4, 4, generator=generator)
    texture = torch.nn.functional.interpolate(texture, (24, 24))[0]
    for subject in range(1, subjects + 1):
        for action in range(1, actions + 1):
            for trial in range(1, trials + 1):
                frames = torch.full((12, 3, 96, 128), 0.4)
                for k, frame in enumerate(frames):
                    frame[:, :10] = k / 12
                    frame[:, 40:64, 40 + 2 * k : 64 + 2 * k] = texture
                name = f"a{action}_s{subject}_t{trial}_color.avi"
                made = write_clip(folder / name.replace(".avi", ".mp4"), frames, fps=15)
                made.rename(folder / name)
    return folder


def test_clips_are_read_with_flow_from_the_frame_they_begin_with(tmp_path):
    write_mhad(tmp_path)
    options = {"held_out_combinations": 1, "held_out_clips": 0}
    (clip, _) = clips("mhad", tmp_path, "test", **options)
    assert clip.frames.shape == (4, 3, 32, 32)
    assert clip.caption.endswith(("left", "right", "wave")) and "person" in clip.caption
    config = DataConfig(
        name="mhad", size=48, frames=4, takes=3,
        options={"folder": str(tmp_path), "frame_sampling": "random", **options},
    )  # fmt: skip
    test = build_dataset(config, "test")
    assert len(test) == 6 and test.labels(0) == test.labels(2)
    drawn = [test[index] for index in range(0, 6, 2)]
    numbers = [(clip.frames[:, 0, 2, 24] * 12).round().int().tolist() for clip in drawn]
    assert len(set(map(tuple, numbers))) == 3 and any(draw[0] > 0 for draw in numbers)
    for clip, draw in zip(drawn, numbers, strict=True):
        assert draw == sorted(draw)
        # 2 pixels a frame in 96, scaled to 48; the window takes 31 of 128 from the left.
        moved = -(draw[3] - draw[0])
        left = 40 + 2 * draw[3] - 31
        x, y = round((left + 12) / 2) + 6, 26
        assert clip.flow.displacement[3, 0, y, x].item() == pytest.approx(moved, abs=1)
        assert not clip.flow.displacement[0].any()
    assert torch.equal(test[2].frames, drawn[1].frames)


def test_training_draws_later_frames_anew(tmp_path):
    """Each draw of a prepared clip is one frame of each interval, with the flow of that frame."""
    write_mhad(tmp_path / "mhad", trials=1)
    options = {"folder": str(tmp_path / "mhad"), "frame_sampling": "random", "frame_choices": 3}
    options |= {"held_out_combinations": 1, "held_out_clips": 0}
    data = DataConfig(name="mhad", size=48, frames=4, takes=2, options=options)
    cache = build_clip_cache(tmp_path / "cache", data)
    assert (cache.frames.shape[:2], cache.length) == ((10, 10), 4)
    source = build_dataset(data)
    assert source[3].frames.shape[0] == 4 and source.pool(3).frames.shape[0] == 10
    generator = torch.Generator().manual_seed(0)
    draws = [cache.draw(generator) for _ in range(200)]
    assert {draw[0] for draw in draws} == {0}
    for place in range(1, 4):
        stored = set(range(3 * place - 2, 3 * place + 1))
        assert {draw[place] for draw in draws} == stored
    numbers = (cache.pixels(3)[:, 0, 2, 24] * 12).round().int()
    for draw in draws[:10]:
        intervals = [int(number) // 3 for number in numbers[draw]]
        assert intervals == [0, 1, 2, 3]
        moved = torch.from_numpy(cache.conditions[3][draw][:, 0].astype("float32")).amin((1, 2))
        expected = -(numbers[draw] - numbers[0]).float() / 24
        assert (moved - expected).abs().max() < 0.06
    # Where nothing is to be drawn, no chance is used.
    before = generator.get_state()
    assert ClipCache(cache.folder).draw(generator) == [*range(10)]
    assert torch.equal(generator.get_state(), before)


def test_takes_need_random_frames(mhad):
    with pytest.raises(SettingsError, match="frame_sampling=random"):
        build_dataset(DataConfig(name="mhad", takes=2, options={"folder": str(mhad)}), "train")
    more = {"folder": str(mhad), "frame_choices": 2}
    with pytest.raises(SettingsError, match=r"frame_choices counts draws .*frame_sampling=random"):
        build_dataset(DataConfig(name="mhad", options=more), "train")
    for options, message in (
        ({"frame_sampling": "odd"}, "frame_sampling must be one of even, random"),
        ({"flow": "magic"}, "flow must be one of dis"),
        ({"flow": "files"}, "must be estimated here"),
        ({"colour": 1}, "unknown setting"),
    ):
        with pytest.raises(SettingsError, match=message):
            clips("mhad", mhad, "train", **options)
    with pytest.raises(SettingsError, match="needs the option folder"):
        build_dataset(DataConfig(name="mug"), "train")
