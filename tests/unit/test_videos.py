"""Training data out of a folder of videos."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")

from lfdm_files import REGIONS

from s2dm.data import DataConfig, build_dataset
from s2dm.data.videos import VideoClips
from s2dm.flow import estimate_flow
from s2dm.models import Checkpoint, RegionMotion, S2DMConfig, save_checkpoint
from s2dm.settings import SettingsError
from s2dm.training.cache import build_clip_cache
from s2dm.video import VideoError, write_clip


def write(path: Path, caption: str | None = "a square moves", shift: int = 1) -> Path:
    """Five frames of a textured square that moves to the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    texture = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (16, 16))
    frames = torch.full((5, 3, 48, 64), 0.5)
    for index, frame in enumerate(frames):
        frame[:, 16:32, 20 + shift * index : 36 + shift * index] = texture[0]
    made = write_clip(path, frames, fps=8)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return made


def touch(path: Path) -> None:
    """A clip that is found and never read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.with_suffix(".txt").write_text(path.stem, encoding="utf-8")


def test_a_clip_is_read_with_its_caption_and_its_flow(tmp_path):
    write(tmp_path / "train" / "one.mp4", "a square\n moves ", shift=2)
    write(tmp_path / "test" / "two.mp4")
    (clip,) = VideoClips(tmp_path, "train", size=48, frames=5)
    assert clip.caption == "a square moves"
    assert clip.frames.shape == (5, 3, 48, 48)
    assert clip.frames.min() >= 0 and clip.frames.max() <= 1
    assert torch.equal(clip.flow.displacement, estimate_flow(clip.frames).displacement)
    # The square was cropped 8 pixels from the left; in the last frame it came from 8 pixels left.
    moved = clip.flow.displacement[4, :, 20:28, 24:32]
    assert moved[0].median().item() == pytest.approx(-8, abs=1)


def test_folders_of_images_and_subfolders_are_clips_too(tmp_path):
    frames = write(tmp_path / "people" / "walk", caption=None)
    frames.rename(frames.with_name("v1.5 walk"))  # a dot in a folder's name ends nothing
    (tmp_path / "people" / "v1.5 walk.txt").write_text("a walk", encoding="utf-8")
    write(tmp_path / "wave.gif", "a wave")
    found = [*VideoClips(tmp_path, "train", 32, 3), *VideoClips(tmp_path, "test", 32, 3)]
    assert {clip.caption for clip in found} == {"a walk", "a wave"}
    assert all(clip.frames.shape == (3, 3, 32, 32) for clip in found)


def test_hidden_files_are_no_clips(tmp_path):
    """As macOS puts them on foreign disks."""
    for name in ("a", "b"):
        touch(tmp_path / f"{name}.mp4")
    (tmp_path / "._a.mp4").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "._0.png").touch()
    assert sum(len(VideoClips(tmp_path, split)) for split in ("train", "test")) == 2


@pytest.mark.parametrize("clips", [2, 3, 40])
def test_about_a_tenth_is_held_out_where_the_folder_does_not_say(tmp_path, clips):
    for number in range(clips):
        touch(tmp_path / f"{number:02d}.mp4")
    train, test = (set(VideoClips(tmp_path, name).captions) for name in ("train", "test"))
    assert len(train | test) == len(train) + len(test) == clips
    assert 1 <= len(test) <= max(1, clips // 5)


def test_a_clip_that_is_added_moves_no_other_one(tmp_path):
    for number in range(30):
        touch(tmp_path / "some" / f"{number:02d}.mp4")
    train, test = (set(VideoClips(tmp_path, name).captions) for name in ("train", "test"))
    for number in range(5):
        touch(tmp_path / f"a {number}.mp4")
    assert train <= set(VideoClips(tmp_path, "train").captions)
    assert test <= set(VideoClips(tmp_path, "test").captions)
    # Nor does a folder that is called otherwise.
    (tmp_path / "some").parent.rename(tmp_path.with_name("elsewhere"))
    assert test <= set(VideoClips(tmp_path.with_name("elsewhere"), "test").captions)


def test_the_folder_says_what_is_held_out(tmp_path):
    for name in ("train/a", "train/b", "test/c"):
        write(tmp_path / f"{name}.mp4", name)
    assert VideoClips(tmp_path, "train").captions == ["train/a", "train/b"]
    assert VideoClips(tmp_path, "test").captions == ["test/c"]


@pytest.mark.parametrize("caption", [None, " \n"])
def test_a_clip_without_caption_is_named(tmp_path, caption):
    write(tmp_path / "one.mp4", caption)
    with pytest.raises(ValueError, match=r"one\.mp4 has no caption: expected .*one\.txt"):
        VideoClips(tmp_path, "test")


@pytest.mark.parametrize("clips", [0, 1])
def test_too_few_clips_say_what_was_expected(tmp_path, clips):
    for number in range(clips):
        write(tmp_path / f"{number}.mp4")
    with pytest.raises(ValueError, match=r"No clip of the split 'train' in .*two or more"):
        VideoClips(tmp_path, "train")


def test_a_broken_video_is_named_when_it_is_read(tmp_path):
    write(tmp_path / "one.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"one\.mp4"):
        VideoClips(tmp_path, "test")[0]


def test_the_data_set_has_a_name_for_the_trainers(tmp_path):
    write(tmp_path / "one.mp4")
    data = DataConfig(name="videos", size=32, frames=4, options={"folder": str(tmp_path)})
    assert build_dataset(data, "test")[0].frames.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {}}, "need the option folder, got none"),
        ({"options": {"folder": "x", "fps": 8}}, "unknown option 'fps' of videos; it has: folder"),
        ({"options": {"folder": "x"}, "takes": 3}, "takes counts draws .* got 3"),
        ({"options": {"folder": "x", "flow": "magic"}}, "one of dis, farneback, raft_large"),
    ],
)
def test_settings_that_videos_do_not_have(settings, message):
    with pytest.raises(SettingsError, match=message):
        build_dataset(DataConfig(name="videos", **settings), "train")


def test_changed_clips_are_prepared_anew(tmp_path):
    folder = tmp_path / "clips"
    write(folder / "train" / "one.mp4", "before")
    write(folder / "test" / "two.mp4")
    data = DataConfig(name="videos", size=32, frames=4, options={"folder": str(folder)})
    first = build_clip_cache(tmp_path / "cache", data)
    assert build_clip_cache(tmp_path / "cache", data).folder == first.folder
    (folder / "train" / "one.txt").write_text("after", encoding="utf-8")
    assert build_clip_cache(tmp_path / "cache", data).captions == ["after"]
    write(folder / "train" / "three.mp4", "one more")
    assert build_clip_cache(tmp_path / "cache", data).captions == ["after", "one more"]


def test_frames_that_were_replaced_are_noticed(tmp_path):
    write(tmp_path / "one", caption=None)
    (tmp_path / "one.txt").write_text("a square moves", encoding="utf-8")
    before = VideoClips(tmp_path, "test").fingerprint
    assert VideoClips(tmp_path, "test").fingerprint == before
    frame = min((tmp_path / "one").iterdir())
    state, content = frame.stat(), frame.read_bytes()
    frame.write_bytes(content)
    os.utime(frame, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    assert VideoClips(tmp_path, "test").fingerprint != before


# ------------------------------------------------------------------- groups, tables, flow, draws


def mhad_folder(folder: Path) -> Path:
    """All of UTD-MHAD's names: four trials of each combination."""
    folder.mkdir()
    for action in range(1, 28):
        for subject in range(1, 9):
            for trial in range(1, 5):
                (folder / f"a{action}_s{subject}_t{trial}_color.avi").touch()
    table = "".join(
        f"{path.name},{path.name.split('_')[0]},{path.name.split('_')[1]},somebody moves\n"
        for path in sorted(folder.iterdir())
    )
    (folder / "clips.csv").write_text("clip,what,who,caption\n" + table, encoding="utf-8")
    return folder


@pytest.mark.parametrize("group", [r"(a\d+_s\d+)_", r"a(\d+)_s(\d+)", "who, what"])
def test_clips_of_one_group_are_held_out_together(tmp_path, group):
    folder = mhad_folder(tmp_path / "clips")
    train, test = (
        {path.name.rsplit("_", 2)[0] for path in clips.paths}
        for clips in (
            VideoClips(folder, name, group=group, table="clips.csv") for name in ("train", "test")
        )
    )
    assert len(train | test) == 216 and not train & test
    assert 10 < len(test) < 35  # about a tenth
    alone = VideoClips(folder, "test", table="clips.csv")
    assert alone.captions[0] == "somebody moves"
    assert {path.name.rsplit("_", 2)[0] for path in alone.paths} & train  # what a group prevents


def test_groups_that_are_not_known_are_told(tmp_path):
    folder = mhad_folder(tmp_path / "clips")
    for options, message in (
        ({"group": "a[0-9]"}, "with a group in parentheses"),
        ({"group": "(a"}, "no regular expression"),
        ({"group": r"(b\d+)"}, r"does not match '\(b"),
        ({"table": "none.csv"}, "there is no table at"),
    ):
        options = {"table": "clips.csv", **options}
        with pytest.raises(SettingsError, match=message):
            VideoClips(folder, "train", **options)
    touch(folder / "new.mp4")
    with pytest.raises(SettingsError, match=r"new\.mp4 is not in the table"):
        VideoClips(folder, "train", group="who", table="clips.csv")
    with pytest.raises(ValueError, match=r"new\.mp4 has no caption: expected one in .*clips\.csv"):
        VideoClips(folder, "train", table="clips.csv")


def test_flow_files_beside_the_clips_are_taken(tmp_path):
    from s2dm.flow import FlowField, save_flow

    write(tmp_path / "one.mp4")
    write(tmp_path / "two", caption=None)
    (tmp_path / "two.txt").write_text("a square moves", encoding="utf-8")
    displacement = torch.zeros(5, 2, 48, 64)
    displacement[1:, 0, :, 40:] = -torch.arange(1.0, 5.0).view(4, 1, 1)
    flow = FlowField(displacement, torch.zeros(5, 1, 48, 64))
    for name in ("one", "two"):
        save_flow(tmp_path / f"{name}.npz", flow)
    clips = [*VideoClips(tmp_path, "train", 24, 3, flow="files")]
    clips += [*VideoClips(tmp_path, "test", 24, 3, flow="files")]
    assert len(clips) == 2
    for clip in clips:  # frames 1, 3 and 5, at half the size, 8 columns cropped on either side
        assert clip.flow.displacement[:, 0, 12, 20].tolist() == pytest.approx([0, -1, -2])
        assert not clip.flow.displacement[:, 0, 12, :8].any()
    before = VideoClips(tmp_path, "test", 24, 3, flow="files").fingerprint
    for name in ("one", "two"):
        save_flow(tmp_path / f"{name}.npz", flow.scale(2.0))
    assert VideoClips(tmp_path, "test", 24, 3, flow="files").fingerprint != before
    with pytest.raises(ValueError, match="begins with frame"):
        takes = VideoClips(tmp_path, "test", 24, 2, 9, "files", "random")
        [takes[index] for index in range(9)]
    (tmp_path / "one.npz").unlink()
    (tmp_path / "two.npz").unlink()
    with pytest.raises(ValueError, match=r"has no flow: expected .*\.npz"):
        VideoClips(tmp_path, "test", 24, 3, flow="files")[0]


def test_a_network_of_torchvision_may_estimate(tmp_path, monkeypatch):
    """Asked for by name, loaded once; here a stand-in that knows its trial and finds no motion."""
    from s2dm.data import flows

    loaded = []

    def load():
        loaded.append(True)

        def model(first, second):
            still = torch.zeros_like(first[:, :2])
            shift = first.new_tensor([6.0, -4.0]).view(1, 2, 1, 1)
            trial = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * shift
            return still + trial if first.shape[2:] == (128, 128) and not seen else still

        return model

    seen: list[bool] = []
    monkeypatch.setitem(flows.NETWORKS, "raft_small", load)
    monkeypatch.setattr(flows, "_loaded", {})
    monkeypatch.setattr("s2dm.flow.estimate._try_out", lambda model: seen.append(True))
    write(tmp_path / "one.mp4", shift=2)
    clips = VideoClips(tmp_path, "test", 48, 5, flow="raft_small")
    assert not loaded
    for _ in range(2):
        assert not clips[0].flow.displacement.any()
    assert loaded == [True] and seen


def test_a_region_motion_model_may_estimate(tmp_path):
    """Flow and soft occlusion of a checkpoint that is named by its path."""
    torch.manual_seed(0)
    model = RegionMotion(REGIONS).eval()
    file = tmp_path / "regions.safetensors"
    weights = {"region_motion": model.state_dict()}
    save_checkpoint(file, Checkpoint(S2DMConfig(region_motion=REGIONS), weights))
    (tmp_path / "clips").mkdir()
    write(tmp_path / "clips" / "one.mp4", shift=2)
    clips = VideoClips(tmp_path / "clips", "test", 48, 3, flow=str(file))
    flow = clips[0].flow
    assert torch.equal(flow.displacement, estimate_flow(clips[0].frames, model).displacement)
    assert ((flow.occlusion > 0) & (flow.occlusion < 1)).any()
    before = clips.fingerprint
    os.utime(file, ns=(1, 1))
    assert VideoClips(tmp_path / "clips", "test", 48, 3, flow=str(file)).fingerprint != before
    with pytest.raises(ValueError, match=r"flow: there is no checkpoint at .*none\.safetensors"):
        VideoClips(tmp_path / "clips", "test", 48, 3, flow=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"flow must be one of dis, .* or a \.safetensors file"):
        VideoClips(tmp_path / "clips", "test", 48, 3, flow="region_motion")


def test_random_frames_are_other_ones_in_each_take(tmp_path):
    write(tmp_path / "one.mp4")
    clips = VideoClips(tmp_path, "test", 32, 2, takes=6, frame_sampling="random")
    assert len(clips) == 6
    drawn = [clip.frames for clip in clips]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(clips[3].frames, drawn[3])
