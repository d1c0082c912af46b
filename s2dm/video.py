"""Clips in and out of files: MP4, GIF and folders of PNG frames, and contact sheets.

Frames are float32 tensors of shape (3, H, W) with values in [0, 1]. Reading and writing stream:
only the frames in hand are in memory, so the length of a clip is not limited by it. A file is
written under a temporary name and renamed when it is complete, so a broken run leaves no half
file behind.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_FPS = 8.0
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
WRITABLE_SUFFIXES = (".mp4", ".mov", ".mkv", ".gif")

# libx264 is missing from some builds of FFmpeg (its licence is GPL); the others play nearly as
# widely, and MPEG-4 part 2 is in every build.
_MP4_CODECS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"crf": "17", "preset": "medium"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "2"}),
)
# The palette of a GIF is made from this many of its first frames, which bounds the memory.
_PALETTE_FRAMES = 64


class VideoError(ValueError):
    """A clip can't be read or written; the message says which, why, and what to do."""


# ---------------------------------------------------------------------------------- reading


def iter_frames(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Yield the frames of a video file or of a folder of images, in order.

    Args:
        path: a video that FFmpeg reads, or a folder whose images (PNG, JPEG, WebP, BMP) are the
            frames in the order of their names.

    Yields:
        (3, H, W) float32 tensors in [0, 1].

    Raises:
        VideoError: the path is missing, is not a video, or holds no frames.
    """
    path = Path(path)
    empty = True
    for pixels in _iter_pixels(path):
        empty = False
        yield _to_tensor(pixels)
    if empty:
        raise VideoError(f"{path} holds no frames.")


def read_clip(
    path: str | os.PathLike[str],
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, float]:
    """Read a clip into one tensor.

    Args:
        path: see `iter_frames`.
        frames: how many frames to take, spread evenly from the first to the last; all if None.
            A clip with fewer frames repeats some.
        size: (height, width) to which each frame is scaled to cover and cropped at the centre,
            while reading, so that a large video never lies in memory at full size.

    Returns:
        The frames, (N, 3, H, W) in [0, 1], and the frame rate of the result in frames a second
        (the duration of the clip stays the same when `frames` thins it out).

    Raises:
        VideoError: see `iter_frames`; or the frames differ in size.
        ValueError: `frames` or `size` is not positive.
    """
    path = Path(path)
    if frames is not None and frames < 1:
        raise ValueError(f"Expected at least 1 frame, got frames={frames}.")
    if size is not None and min(size) < 1:
        raise ValueError(f"Expected a positive (height, width), got {size}.")
    fps = frame_rate(path)
    wanted: list[int] | None = None
    if frames is not None:
        total = sum(1 for _ in _iter_pixels(path, decode_only=True))
        if total == 0:
            raise VideoError(f"{path} holds no frames.")
        wanted = [round(i * (total - 1) / max(frames - 1, 1)) for i in range(frames)]
        fps *= frames / total
    kept: list[Tensor] = []
    for index, pixels in enumerate(_iter_pixels(path)):
        repeats = 1 if wanted is None else wanted.count(index)
        if not repeats:
            continue
        frame = _to_tensor(pixels)
        if size is not None:
            frame = cover(frame.unsqueeze(0), *size)[0]
        if kept and frame.shape != kept[0].shape:
            raise VideoError(
                f"The frames of {path} differ in size: {_size_text(kept[0])}, then "
                f"{_size_text(frame)}. Give a size to bring them to one."
            )
        kept.extend([frame] * repeats)
    if not kept:
        raise VideoError(f"{path} holds no frames.")
    return torch.stack(kept), fps


def frame_rate(path: str | os.PathLike[str]) -> float:
    """Frames a second of a video file; `DEFAULT_FPS` for a folder or where the file has none."""
    path = Path(path)
    if path.is_dir():
        return DEFAULT_FPS
    with _open_video(path) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else DEFAULT_FPS


def cover(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale frames (N, C, H, W) to cover height x width, then crop them at the centre."""
    factor = max(height / frames.shape[-2], width / frames.shape[-1])
    if factor != 1:
        scaled = (
            max(height, round(frames.shape[-2] * factor)),
            max(width, round(frames.shape[-1] * factor)),
        )
        frames = F.interpolate(frames, scaled, mode="bilinear", antialias=True)
    top = (frames.shape[-2] - height) // 2
    left = (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width].clamp(0, 1)


def _iter_pixels(path: Path, decode_only: bool = False) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 frames; with `decode_only`, empty arrays (to count quickly)."""
    empty = np.empty(0, np.uint8)
    if path.is_dir():
        from PIL import Image, UnidentifiedImageError

        for file in sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            if decode_only:
                yield empty
                continue
            try:
                with Image.open(file) as image:
                    pixels = np.array(image.convert("RGB"))
            except (UnidentifiedImageError, OSError) as error:
                raise VideoError(f"{file} is not an image that can be read: {error}") from error
            yield pixels
        return

    import av

    with _open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                yield empty if decode_only else frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise VideoError(
                f"{path} can't be decoded: {error}. The file may be cut short; make it anew."
            ) from error


@contextlib.contextmanager
def _open_video(path: Path):
    import av

    if not path.is_file():
        raise VideoError(f"There is no clip at {path}. Give a video file or a folder of images.")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} is not a video that can be read ({error}). Expected a file such as "
            f"{', '.join(VIDEO_SUFFIXES)} or a folder of images."
        ) from error
    with container:
        if not container.streams.video:
            raise VideoError(f"{path} has no picture track.")
        yield container, container.streams.video[0]


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255)


# ---------------------------------------------------------------------------------- writing


def write_clip(
    path: str | os.PathLike[str], frames: Tensor | Iterable[Tensor], fps: float = DEFAULT_FPS
) -> Path:
    """Write frames to a video file, a GIF or a folder of PNG images.

    Args:
        path: the ending decides: `.mp4`, `.mov`, `.mkv` (H.264 in yuv420p; another codec where
            the FFmpeg at hand lacks it), `.gif`, or no ending for a folder of `frame_00001.png`
            and so on. An existing file is replaced; an existing folder only if it holds nothing
            but such frames.
        frames: (N, 3, H, W), or any iterable (a generator, too) of (3, H, W), float in [0, 1].
            H.264 wants even sizes: an odd last row or column is repeated.
        fps: frames a second.

    Returns:
        The path that was written.

    Raises:
        VideoError: unknown ending, no frames, or a frame of a wrong shape or size.
    """
    path = Path(path)
    if not fps > 0:
        raise VideoError(f"Expected a positive frame rate, got {fps}.")
    suffix = path.suffix.lower()
    if suffix and suffix not in WRITABLE_SUFFIXES:
        raise VideoError(
            f"Can't write a clip as {suffix}. Expected {', '.join(WRITABLE_SUFFIXES)}, or a name "
            "without an ending for a folder of PNG frames."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = _iter_checked(frames)
    if not suffix:
        _write_folder(path, pixels)
        return path
    with replacing(path) as temporary:
        if suffix == ".gif":
            _write_gif(temporary, pixels, fps)
        else:
            _write_video(temporary, pixels, fps)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` (same ending); rename it to `path` if all went well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only the user may read; a result is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _iter_checked(frames: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 arrays; raise on no frames, a wrong shape or a changed size."""
    first: Tensor | None = None
    for index, frame in enumerate(frames, start=1):
        if not isinstance(frame, Tensor) or frame.ndim != 3 or frame.shape[0] != 3:
            got = tuple(frame.shape) if isinstance(frame, Tensor) else type(frame).__name__
            raise VideoError(f"Frame {index}: expected a (3, H, W) tensor, got {got}.")
        if first is None:
            first = frame
        elif frame.shape != first.shape:
            raise VideoError(
                f"Frame {index} is {_size_text(frame)}, but the first one is "
                f"{_size_text(first)}. All frames of a clip have one size."
            )
        yield to_uint8(frame)
    if first is None:
        raise VideoError("There are no frames to write.")


def to_uint8(frame: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to a contiguous (H, W, 3) uint8 array, rounded to the nearest."""
    scaled = frame.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())


def _write_folder(folder: Path, pixels: Iterator[np.ndarray]) -> None:
    from PIL import Image

    if folder.exists():
        if not folder.is_dir():
            raise VideoError(f"{folder} is a file; a folder of frames can't be written there.")
        foreign = [p.name for p in folder.iterdir() if not _is_our_frame(p.name)]
        if foreign:
            raise VideoError(
                f"The folder {folder} holds other files ({foreign[0]}). Give a new or an empty "
                "folder, so that nothing of yours is replaced."
            )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for index, frame in enumerate(pixels, start=1):
            Image.fromarray(frame).save(temporary / f"frame_{index:05d}.png")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.chmod(0o755)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_our_frame(name: str) -> bool:
    return name.startswith("frame_") and name.endswith(".png") and name[6:-4].isdigit()


def _write_video(path: Path, pixels: Iterator[np.ndarray], fps: float) -> None:
    import av

    first = next(pixels)
    height, width = (side + side % 2 for side in first.shape[:2])
    with av.open(str(path), "w") as container:
        stream = _add_stream(container, fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in itertools.chain((first,), pixels):
            odd = [(0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)]
            picture = av.VideoFrame.from_ndarray(np.pad(frame, odd, "edge"), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _add_stream(container, fps: float):
    import av

    rate = Fraction(fps).limit_denominator(1000)
    for name, options in _MP4_CODECS:
        if name in av.codecs_available:
            if name != _MP4_CODECS[0][0]:
                logger.warning("This FFmpeg has no libx264; writing the video with %s.", name)
            return container.add_stream(name, rate=rate, options=dict(options))
    raise VideoError(
        "The FFmpeg that PyAV carries has no codec for MP4 files. Write a .gif or a folder of "
        "PNG frames, or reinstall the package av."
    )


def _write_gif(path: Path, pixels: Iterator[np.ndarray], fps: float) -> None:
    """One palette for the whole clip and ordered dither, so that what is still stays still."""
    import av

    head = list(itertools.islice(pixels, _PALETTE_FRAMES))
    height, width = head[0].shape[:2]
    rate = Fraction(fps).limit_denominator(100)

    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        stream.time_base = 1 / rate
        # The graph has to outlive its filters, or FFmpeg reads freed memory.
        _graph, source, palette_source, sink = _palette_use(width, height, rate)
        palette = _make_palette(head)
        palette.time_base, palette.pts = 1 / rate, 0
        palette_source.push(palette)
        palette_source.push(None)

        def drain() -> None:
            # The filter says "not yet" and "no more" by these two errors.
            with contextlib.suppress(av.BlockingIOError, av.EOFError):
                while True:
                    picture = sink.pull()
                    container.mux(stream.encode(picture))

        for index, frame in enumerate(itertools.chain(head, pixels)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base, picture.pts = 1 / rate, index
            source.push(picture)
            drain()
        source.push(None)
        drain()
        container.mux(stream.encode(None))


def _make_palette(frames: Sequence[np.ndarray]):
    """The 16x16 palette picture of FFmpeg's palettegen for these frames."""
    import av

    height, width = frames[0].shape[:2]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 25))
    maker = graph.add("palettegen", "reserve_transparent=0:stats_mode=full")
    sink = graph.add("buffersink")
    source.link_to(maker)
    maker.link_to(sink)
    graph.configure()
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.time_base, picture.pts = Fraction(1, 25), index
        source.push(picture)
    source.push(None)
    return sink.pull()


def _palette_use(width: int, height: int, rate: Fraction):
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    palette = graph.add_buffer(width=16, height=16, format="bgra", time_base=1 / rate)
    user = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    sink = graph.add("buffersink")
    source.link_to(user, 0, 0)
    palette.link_to(user, 0, 1)
    user.link_to(sink)
    graph.configure()
    return graph, source, palette, sink


# -------------------------------------------------------------------------- contact sheets


def contact_sheet(
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    gap: int = 2,
):
    """Lay clips out as a grid: one row a clip, time from left to right.

    Args:
        rows: clips of (N, 3, H, W) in [0, 1]; frames may differ in number and size, a cell is as
            large as the largest.
        labels: a short text for each row, written at its left.
        columns: show at most this many frames of each clip, spread evenly over it.
        gap: pixels between the cells.

    Returns:
        A `PIL.Image.Image` in RGB.

    Raises:
        ValueError: no rows, a row that is not (N, 3, H, W) with N >= 1, or a wrong number of
            labels.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("A contact sheet needs at least one row of frames.")
    for number, row in enumerate(rows, start=1):
        if row.ndim != 4 or row.shape[1] != 3 or row.shape[0] < 1:
            raise ValueError(
                f"Row {number}: expected frames of shape (N, 3, H, W), got {tuple(row.shape)}."
            )
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"Expected {len(rows)} labels, one for each row, got {len(labels)}.")
    picked = [row[_spread(len(row), columns)] for row in rows]
    cell_height = max(row.shape[-2] for row in picked) + gap
    cell_width = max(row.shape[-1] for row in picked) + gap
    font = ImageFont.load_default()
    margin = 0
    if labels is not None:
        margin = 8 + int(max(font.getbbox(line)[2] for text in labels for line in _lines(text)))
    size = (
        margin + max(len(row) for row in picked) * cell_width + gap,
        len(picked) * cell_height + gap,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(picked):
        top = gap + y * cell_height
        if labels is not None:
            draw.multiline_text((4, top + 2), "\n".join(_lines(labels[y])), "black", font=font)
        for x, frame in enumerate(row):
            sheet.paste(Image.fromarray(to_uint8(frame)), (margin + gap + x * cell_width, top))
    return sheet


def write_contact_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Write `contact_sheet` to an image file (PNG, JPEG or what Pillow knows by the ending)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(rows, labels, columns)
    with replacing(path) as temporary:
        sheet.save(temporary)
    return path


def _lines(text: str) -> list[str]:
    """A label in at most three lines, so that a caption doesn't widen the sheet."""
    import textwrap

    return textwrap.wrap(text, 26, max_lines=3, placeholder="…") or [""]


def _spread(count: int, columns: int | None) -> list[int]:
    if columns is None or columns >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(columns - 1, 1)) for i in range(columns)]


def _size_text(frame: Tensor) -> str:
    return f"{frame.shape[-1]}x{frame.shape[-2]}"
