"""Texts that people write with their editors, and what their systems leave beside clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("av")

from s2dm.data.videos import VideoClips
from s2dm.files import in_order, is_left_by_systems, read_text
from s2dm.settings import SettingsError, read_settings
from s2dm.training.config import TrainingConfig

CAPTION = "Ein Mann im grünen Mantel, 10 €"
MARKED = ["utf-8-sig", "utf-16", "utf-32"]  # Python writes their byte-order mark
BIG_ENDIAN = b"\xfe\xff" + CAPTION.encode("utf-16-be")


def two_clips(folder: Path, caption: str = "CLIP.txt", clip: str = "CLIP.mp4") -> Path:
    """`folder/train/clip` with a caption file of that name, and another clip to test on."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    (folder / "train" / clip).touch()
    (folder / "train" / caption).write_text(CAPTION, encoding="utf-8")
    (folder / "test" / "other.mp4").touch()
    (folder / "test" / "other.txt").write_text("another one", encoding="utf-8")
    return folder


@pytest.mark.parametrize("content", [*(CAPTION.encode(name) for name in MARKED), BIG_ENDIAN])
def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path, content):
    (two_clips(tmp_path) / "train" / "CLIP.txt").write_bytes(content)
    assert VideoClips(tmp_path).captions == [CAPTION]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (("a man\n" + CAPTION).encode("cp1252"), "the byte 0xfc in line 2"),
        (CAPTION.encode("utf-16-be"), "."),
        ("A man".encode("utf-16-le"), "zero bytes"),
        ("A man".encode("utf-16-be"), "zero bytes"),
        (b"\xff\xfeA", "the byte"),  # cut short
    ],
)
def test_another_encoding_is_refused_by_the_name_of_the_file(tmp_path, content, found):
    (two_clips(tmp_path) / "train" / "CLIP.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"CLIP\.txt: expected text in UTF-8, got .*{found}"):
        VideoClips(tmp_path)


@pytest.mark.parametrize(
    ("clip", "caption"),
    [("A.MP4", "A.TXT"), ("A.mp4", "A.Txt"), ("A.MP4", "A.txt"), ("a.v1.Mov", "a.v1.TXT")],
)
def test_endings_may_be_written_large_or_small(tmp_path, clip, caption):
    two_clips(tmp_path, caption, clip)
    assert VideoClips(tmp_path).captions == [CAPTION]


def test_clips_whose_names_differ_in_size_keep_their_captions(tmp_path):
    folder = two_clips(tmp_path, "a.txt", "a.mp4") / "train"
    (folder / "A.mp4").touch()
    (folder / "A.TXT").write_text("the large one", encoding="utf-8")
    if len(list(folder.iterdir())) < 4:
        pytest.skip("this disk doesn't tell large from small")
    assert VideoClips(tmp_path).captions == ["the large one", CAPTION]


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED])
@pytest.mark.parametrize("name", ["run.toml", "run.json", "RUN.JSON"])
def test_settings_are_read_in_these_encodings_too(tmp_path, name, encoding):
    settings = {"steps": 7, "output": "läufe/1"}
    lines = "\r\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    text = lines if name.endswith("toml") else json.dumps(settings, ensure_ascii=False)
    (tmp_path / name).write_bytes(text.encode(encoding))
    config = read_settings(TrainingConfig, tmp_path / name)
    assert (config.steps, config.output) == (7, "läufe/1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.toml", b"steps = \n", r"run\.toml: .*line 1"),
        ("run.json", b"{steps: 3}", r"run\.json: .*line 1"),
        ("run.json", b"[3]", r"run\.json: settings must be an object, got \[3\]"),
        ("run.toml", 'output = "läufe"'.encode("cp1252"), r"run\.toml: expected text in UTF-8"),
    ],
)
def test_settings_that_are_none_name_their_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(TrainingConfig, tmp_path / name)
    assert isinstance(error.value, SettingsError) or "UTF-8" in message


LEFT = [
    ".ipynb_checkpoints", ".Trash-1000/files", ".Trashes/501", "@eaDir", "#recycle", "__MACOSX",
    "$RECYCLE.BIN/S-1-5-21", "System Volume Information", "lost+found", ".git", "#snapshot/daily",
]  # fmt: skip


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("splits", [True, False])
def test_copies_that_systems_keep_are_no_clips(tmp_path, left, splits):
    """Else a clip that is held out may be trained on."""
    folder = two_clips(tmp_path / ".data" / "clips")  # what is above the folder doesn't matter
    if not splits:
        for split in ("train", "test"):
            (folder / split).rename(folder / f"my {split}")
    before = [VideoClips(folder, name).captions for name in ("train", "test")]
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        hidden = place / left
        hidden.mkdir(parents=True)
        (hidden / "other-checkpoint.mp4").touch()
        (hidden / "other-checkpoint.txt").write_text("another one", encoding="utf-8")
        (hidden / "frames").mkdir()
        (hidden / "frames" / "1.png").touch()
        (hidden / "frames.txt").write_text("another one", encoding="utf-8")
    after = [VideoClips(folder, name).captions for name in ("train", "test")]
    assert after == before
    assert sorted([*after[0], *after[1]]) == sorted([CAPTION, "another one"])


def test_names_that_only_look_alike_stay(tmp_path):
    names = ["#1", "@someone", "$5", "recycling", "System", "2 lost+found"]
    assert not any(map(is_left_by_systems, names))
    paths = [Path(name) for name in ("2", "10", "@eaDir", ".x", "lost+found")]
    assert in_order(paths) == [Path("2"), Path("10")]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*clips.*data\.options\.folder"):
        VideoClips(tmp_path / "clips")


def test_a_text_without_a_mark_is_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(CAPTION.encode())
    assert read_text(tmp_path / "a.txt") == CAPTION
    (tmp_path / "a.txt").write_bytes(b"")
    assert read_text(tmp_path / "a.txt") == ""
