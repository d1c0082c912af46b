"""Any name of a file is a name of a file: no protocol, no pattern, no option."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from s2dm import video

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="such names can't be there")

NAMES = (
    *("take:1", "a:b:c", "http:x", "https:x", "concat:a", "file:x", "pipe:0", "data:x", "crypto:x"),
    *("tee:a", "subfile,,start,0,end,1,,:x", "unix:x", "async:x", "cache:x"),
    *("%03d", "%d", "take%", "-", "-y", "a|b", "[a]", "*", "?", "~", "@x", "#x", "a?b=1&c", "a\nb"),
    *("'a'", '"a"', " a", "Zürich 東京", "\udcff"),
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 32, 48)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ""])
def test_a_clip_of_any_name_is_written_and_read(clip, suffix):
    names = NAMES if suffix == ".mkv" else NAMES[::4]
    for name in names:
        path = Path(name + suffix)
        assert video.write_clip(path, clip) == path
        assert path.is_file() if suffix else path.is_dir()
        frames, _ = video.read_clip(path, frames=4)
        assert (frames - clip).abs().mean() < 0.02, name
        assert len(list(video.iter_frames(name + suffix))) == 4
    assert len(list(Path().iterdir())) == len(names)


def test_the_ending_of_a_video_may_be_missing(clip):
    video.write_clip("clip.mp4", clip)
    for name in ("-", "http:x", "%03d", "take:1"):
        shutil.copy("clip.mp4", name)
        assert len(video.read_clip(name)[0]) == 4


def test_a_number_in_a_name_makes_no_series_of_it():
    """Where FFmpeg would read the neighbours."""
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(f"00{number}.png")
        shutil.copy(f"00{number}.png", f"00{number}.dpx")
    Image.new("RGB", (8, 8), "red").save("%03d.png")
    assert video.read_clip("%03d.png")[0].mean((0, 2, 3)).tolist() == [1, 0, 0]
    assert video.read_image("%03d.png").mean((1, 2)).tolist() == [1, 0, 0]
    for name in ("%03d.png", "%03d.dpx"):
        Path(name).write_text("neither a picture nor a video")
        with pytest.raises(video.VideoError, match=name.replace(".", r"\.")):
            video.read_clip(name)


def test_a_tag_in_another_encoding_is_no_error(clip):
    import av

    with av.open("c.mkv", "w") as container:
        container.metadata["title"] = "Zuerich"
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "gray"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame(48, 32, "gray")))
        container.mux(stream.encode(None))
    content = Path("c.mkv").read_bytes()
    assert b"Zuerich" in content
    Path("c.mkv").write_bytes(content.replace(b"Zuerich", b"Z\xfcerich"))
    assert len(video.read_clip("c.mkv")[0]) == 2
