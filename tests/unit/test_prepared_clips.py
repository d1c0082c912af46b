"""Prepared clips: what is kept of a clip, going on after a stop, and files that can't be used."""

import errno
import json
from pathlib import Path

import pytest
import torch
from prepared_clips import encoders, moving_clip, sources, write_clips

from s2dm.data.prepared import (
    ClipsError,
    Encoders,
    PreparedClips,
    Source,
    folder_sources,
    frames_source,
    prepare_clips,
)
from s2dm.video import write_clip


def test_what_comes_back_is_what_went_in(tmp_path: Path) -> None:
    clips = write_clips(tmp_path)
    assert (len(clips), clips.num_frames, clips.latent_shape) == (3, 4, (4, 4, 4))
    clip, given = moving_clip(1), encoders()
    assert clips.captions[1] == "square number 1"
    assert (clips.latents(1) - given.latents(clip.pixels)).abs().max() < 1e-3
    assert (clips.latents(1, [2, 0]) - given.latents(clip.pixels)[[2, 0]]).abs().max() < 1e-3
    assert (clips.text(1) - given.text(clip.caption)).abs().max() < 5e-3
    assert (clips.empty_text - given.text("")).abs().max() < 5e-3
    assert (clips.flow(1).displacement - clip.flow.displacement).abs().max() < 1e-2
    assert (clips.flow(1).occlusion - clip.flow.occlusion).abs().max() < 1 / 255
    seen = clips.condition(1, [3, 1], (16, 24))
    assert (seen - clip.flow.condition(16, 24)[[3, 1]]).abs().max() < 1e-3


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    loaded = []

    def noted(source: Source) -> Source:
        def load():
            loaded.append(source.name)
            return source.load()

        return Source(source.name, source.key, load)

    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    every = [noted(source) for source in sources(4)]
    with pytest.raises(KeyboardInterrupt):
        prepare_clips(tmp_path, every, 4, encoders(), stop)
    with pytest.raises(ClipsError, match="Prepare them again"):
        PreparedClips(tmp_path)
    clips = prepare_clips(tmp_path, every, 4, encoders())
    assert loaded == ["clip 0", "clip 1", "clip 2", "clip 3"]
    assert len(clips) == 4


def test_what_is_no_longer_among_the_clips_is_dropped(tmp_path: Path) -> None:
    write_clips(tmp_path, count=3)
    before = PreparedClips(tmp_path).key
    clips = write_clips(tmp_path, count=2)
    assert len(list(tmp_path.glob("clip_*"))) == len(clips) == 2
    assert clips.key != before


def test_other_weights_prepare_the_clips_anew(tmp_path: Path) -> None:
    before = write_clips(tmp_path).paths
    given = encoders()
    for changed in (
        Encoders(lambda frames: 1.1 * given.latents(frames), given.text),
        Encoders(given.latents, lambda caption: given.text(caption) + 0.1),
    ):
        assert not set(before) & set(prepare_clips(tmp_path, sources(3), 3, changed).paths)


def test_a_full_disk_says_so_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    real, written = safetensors.torch.save_file, []

    def full(*args, **kwargs):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ClipsError, match=r"No space left.*Make room.*goes on"):
        write_clips(tmp_path)
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["clip_", "clip_"]
    monkeypatch.undo()
    assert len(write_clips(tmp_path)) == 3


@pytest.mark.parametrize("harm", ["gone", "cut", "empty", "index"])
def test_harmed_files_are_refused_with_a_remedy(tmp_path: Path, harm: str) -> None:
    path = write_clips(tmp_path).paths[1]
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        (tmp_path / "clips.json").write_text('{"format": 1}')
    with pytest.raises(ClipsError, match=r"[Pp]repare the"):
        PreparedClips(tmp_path)
    if harm != "index":
        assert len(write_clips(tmp_path)) == 3


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    write_clips(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "clips.json").read_text())
    other = write_clips(tmp_path / "b").paths[0]
    index["clips"][0]["file"] = f"../b/{other.name}x"
    (tmp_path / "a" / "clips.json").write_text(json.dumps(index))
    with pytest.raises(ClipsError, match="can't be read"):
        PreparedClips(tmp_path / "a")


def test_clips_of_different_sizes_are_refused(tmp_path: Path) -> None:
    mixed = [*sources(1, frames=4), *sources(2, frames=6)]
    with pytest.raises(ClipsError, match="same settings"):
        prepare_clips(tmp_path, mixed, 3, encoders())


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    given = encoders()
    broken = Encoders(lambda frames: given.latents(frames) * torch.nan, given.text)
    with pytest.raises(ClipsError, match=r"clip 0: expected finite latents.*VAE"):
        prepare_clips(tmp_path, sources(1), 1, broken)


def test_a_folder_of_videos_is_read_and_a_changed_file_seen(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_clip(folder / "move.mp4", moving_clip(0, size=64).pixels, 8)
    (folder / "move.txt").write_text("a square moves")
    (source,) = folder_sources(folder, 3, (32, 48))
    clip = source.load()
    assert tuple(clip.frames.shape) == (3, 3, 32, 48)
    assert clip.caption == "a square moves"
    (folder / "move.txt").write_text("a square stands")
    assert folder_sources(folder, 3, (32, 48))[0].key != source.key


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_clips_is_refused(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "clips"
    if there:
        folder.mkdir()
    with pytest.raises(ClipsError, match="expected"):
        folder_sources(folder, 4, (32, 32))


def test_frames_at_hand_are_known_by_what_they_show() -> None:
    pixels = moving_clip(0).pixels
    shape = (3, (24, 32))
    one = frames_source("a", pixels, "moves", *shape)
    assert tuple(one.load().frames.shape) == (3, 3, 24, 32)
    assert one.key == frames_source("b", pixels.clone(), "moves", *shape).key
    assert one.key != frames_source("a", pixels.flip(0), "moves", *shape).key
    assert one.key != frames_source("a", pixels, "stands", *shape).key
    assert one.key != frames_source("a", pixels, "moves", 4, (24, 32)).key


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ClipsError, match=r"clip\.mp4, which is a file"):
        folder_sources(tmp_path / "clip.mp4", 4, (32, 32))


@pytest.mark.parametrize("count", [1, 5])
def test_clips_in_which_nothing_moves_are_refused(tmp_path: Path, count: int) -> None:
    """A photo as a video, and a frame that was held: they teach that people don't move."""
    still = moving_clip(0, size=64).pixels[:1].expand(count, -1, -1, -1)
    write_clip(tmp_path / "still.mp4", still, 8)
    (tmp_path / "still.txt").write_text("a square")
    held = frames_source("video 1", still, "a square", 3, (32, 32))
    for source in (*folder_sources(tmp_path, 3, (32, 32)), held):
        with pytest.raises(ClipsError, match=rf"^{source.name}: .*something moves.*Take it out"):
            prepare_clips(tmp_path / "prepared", [source], 1, encoders())


def test_a_long_clip_can_be_stopped_within(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise StopError

    pixels = moving_clip(0).pixels
    write_clip(tmp_path / "move.mp4", moving_clip(0, size=64).pixels, 8)
    (tmp_path / "move.txt").write_text("a square moves")
    shape = (4, (32, 32), "dis", stop)
    for source in (*folder_sources(tmp_path, *shape), frames_source("a", pixels, "moves", *shape)):
        with pytest.raises(StopError):
            prepare_clips(tmp_path / "prepared", [source], 1, encoders())
