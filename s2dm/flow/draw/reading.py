"""A drawn motion from JSON: the editor's state, or the paths that other tools write.

docs/motion.md describes both. Whatever is wrong is named with its place, as `layers[1].tracks[0]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

import numpy as np

from ..field import FlowError
from .state import MOVES, REPEATS, SPEEDS, Array, CameraKey, Layer, Mask, Motion, Polygon

VERSION = 1
_TEXT = 32 << 20  # characters
_SIDE, _FRAMES = 8192, 4096
_LAYERS, _CONTROLS, _POINTS, _CORNERS, _KEYS = 64, 2000, 100_000, 20_000, 4096
_FAR = 1e5  # pixels
_ZOOM, _ROLL, _CYCLES = 100.0, 36_000.0, 1000.0
_Item = TypeVar("_Item")


def read_motion(text: str, width: int, height: int) -> Motion:
    """A motion on a picture of width x height pixels.

    text: JSON. An object is the editor's state, and is resized from the size that it was drawn
    at. A list of paths, each a list of {"x": …, "y": …}, or one such path, has no size: it is in
    pixels of this picture. Nothing is a still picture.

    Raises FlowError with the place of whatever is wrong.
    """
    content = parse(text, "motion")
    if content is None:
        return Motion(width, height)
    if isinstance(content, list):
        tracks = _paths(content, "")
        radius = default_radius(width, height)
        return Motion(width, height, (Layer(tracks=tracks, radius=radius),) if tracks else ())
    if not isinstance(content, dict):
        raise FlowError(
            f"motion: expected an object with layers, or a list of paths, got {_shown(content)}. "
            'Draw it in the node, or paste paths as [[{"x": 10, "y": 20}, …], …].'
        )
    return _motion(content, width, height).resize(width, height)


def read_tracks(text: str, size: tuple[int, int] | None = None) -> tuple[Array, ...]:
    """Paths alone: [[{"x": …, "y": …}, …], …] or one of them, in pixels.

    Of the editor's state its tracks are taken, from the size that it was drawn at to `size`, width
    and height; None: as they are.
    Returns (n,3) each, x, y and time in [0, 1]; points without "t" are spread evenly.
    """
    content = parse(text, "coordinates")
    if content is None:
        return ()
    if isinstance(content, dict) and "layers" in content:
        motion = _motion(content, *(size or (1, 1)))
        layers = (motion.resize(*size) if size else motion).layers
        return tuple(track for layer in layers for track in layer.tracks)
    if not isinstance(content, list):
        raise FlowError(
            f"coordinates: expected a list of paths, got {_shown(content)}. Paste paths as "
            '[[{"x": 10, "y": 20}, …], …].'
        )
    return _paths(content, "")


def read_points(text: str) -> Array:
    """Points of frame 1, (P,2): [{"x": …, "y": …}, …], or paths, of which the first points count.

    Raises FlowError with the place of whatever is wrong.
    """
    content = parse(text, "points")
    if not isinstance(content, list):
        raise FlowError(
            f"points: expected a list of points, got {_shown(content)}. Give them as "
            '[{"x": 10, "y": 20}, …].'
        )
    if content and isinstance(content[0], dict):
        points = [_point(item, f"[{index}]") for index, item in enumerate(content)]
        return np.array([point[:2] for point in points], np.float64)
    return np.array([track[0, :2] for track in _paths(content, "")], np.float64).reshape(-1, 2)


def default_radius(width: int, height: int) -> float:
    """An eighth of the picture's shorter side, in pixels."""
    return max(1.0, min(width, height) / 8)


def parse(text: str, name: str) -> Any:
    """JSON, strictly; None for an empty text. Single quotes, as Python prints lists, do too."""
    if not isinstance(text, str):
        raise FlowError(f"{name}: expected a text, JSON, got {type(text).__name__}.")
    text = text.strip().removeprefix("\ufeff")  # which some editors put before what they save
    if not text:
        return None
    if len(text) > _TEXT:
        raise FlowError(
            f"{name}: expected at most {_TEXT >> 20} million characters, got {len(text)}."
        )
    if '"' not in text:
        text = text.replace("'", '"')
    try:
        return json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise FlowError(
            f"{name}: expected JSON, got something else in line {error.lineno}, column "
            f"{error.colno} ({error.msg}). Copy all of it, from its first bracket to its last."
        ) from error
    except RecursionError as error:
        raise FlowError(f"{name}: expected lists of points, got brackets nested too deep.") from (
            error
        )
    except ValueError as error:  # an integer of thousands of digits
        raise FlowError(f"{name}: expected JSON with ordinary numbers, got {error}") from error


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant}. Give each point a finite x and y.")


def _motion(content: dict[str, Any], width: int, height: int) -> Motion:
    if not {"layers", "camera"} & set(content):
        keys = ", ".join(sorted(str(key) for key in content)[:8]) or "no keys"
        raise FlowError(
            f"motion: expected an object with layers or camera, got one with {keys}. This is the "
            'JSON of something else; paths alone are a list, [[{"x": 10, "y": 20}, …], …].'
        )
    version = _number(content, "version", "", VERSION, 1, 1e6)
    if version != VERSION:
        raise FlowError(
            f"version: expected {VERSION}, got {version:g}. The drawing is from a newer version "
            "of the pack: update it."
        )
    width = _whole(content, "width", "", width, _SIDE)
    height = _whole(content, "height", "", height, _SIDE)
    frames = None
    if content.get("frames") is not None:
        frames = _whole(content, "frames", "", 16, _FRAMES)
    layers = _each(content, "layers", "", _LAYERS, lambda item, at: _layer(item, at, width, height))
    # What the editor hides is checked as the rest is, and left out.
    hidden = [item.get("visible") is False for item in content.get("layers") or ()]
    layers = tuple(layer for layer, out in zip(layers, hidden, strict=True) if not out)
    camera = _each(content, "camera", "", _KEYS, _key)
    for index in range(1, len(camera)):
        if camera[index].t < camera[index - 1].t:
            raise FlowError(
                f"camera[{index}].t: expected keys in order of time, got {camera[index].t:g} after "
                f"{camera[index - 1].t:g}."
            )
    return Motion(width, height, layers, camera, frames)


def _layer(item: Any, at: str, width: int, height: int) -> Layer:
    item = _object(item, at)
    tracks = _each(item, "tracks", at, _CONTROLS, _track)
    pins = _each(item, "pins", at, _CONTROLS, _point)
    if len(tracks) + len(pins) > _CONTROLS:
        raise FlowError(
            f"{at}: expected at most {_CONTROLS} tracks and pins, got {len(tracks) + len(pins)}."
        )
    return Layer(
        name=str(item.get("name") or ""),
        region=_region(item.get("region"), f"{at}.region"),
        tracks=tuple(track for track in tracks if len(track)),
        pins=np.array([pin[:2] for pin in pins], np.float64).reshape(-1, 2),
        radius=_number(item, "radius", at, default_radius(width, height), 0.5, _FAR),
        move=_choice(item, "move", at, MOVES, "free"),
        speed=_choice(item, "speed", at, SPEEDS, "linear"),
        repeat=_choice(item, "repeat", at, REPEATS, "once"),
        cycles=_number(item, "cycles", at, 1.0, 1, _CYCLES),
    )


def _region(item: Any, at: str) -> Polygon | Mask | None:
    if item is None:
        return None
    item = _object(item, at)
    if "polygon" in item:
        corners = _each(item, "polygon", at, _CORNERS, _corner)
        return Polygon(np.array(corners, np.float64).reshape(-1, 2))
    if "runs" not in item:
        raise FlowError(
            f"{at}: expected null, a polygon or runs, got an object with "
            f"{', '.join(sorted(map(str, item))[:8]) or 'no keys'}."
        )
    width = _whole(item, "width", at, 0, _SIDE)
    height = _whole(item, "height", at, 0, _SIDE)
    lengths = _each(item, "runs", at, width * height + 1, _run)
    total = sum(lengths)
    if total != width * height:
        raise FlowError(
            f"{at}.runs: expected lengths that add up to {width} x {height} = {width * height}, "
            f"got {total}."
        )
    inside = np.arange(len(lengths)) % 2 == 1
    return Mask(np.repeat(inside, lengths).reshape(height, width))


def _paths(content: list[Any], at: str) -> tuple[Array, ...]:
    if content and isinstance(content[0], dict):
        content = [content]
    if len(content) > _CONTROLS:
        raise FlowError(f"tracks: expected at most {_CONTROLS}, got {len(content)}.")
    tracks = [_track(item, f"{at}[{index}]") for index, item in enumerate(content)]
    return tuple(track for track in tracks if len(track))


def _track(item: Any, at: str) -> Array:
    if not isinstance(item, list):
        raise FlowError(f"{at}: expected a list of points, got {_shown(item)}.")
    if len(item) > _POINTS:
        raise FlowError(f"{at}: expected at most {_POINTS} points, got {len(item)}.")
    points = [_point(point, f"{at}[{index}]") for index, point in enumerate(item)]
    return _timed(points, at)


def _timed(points: list[tuple[float, float, float | None]], at: str) -> Array:
    """(n,3): points between two that have a time are spread evenly between them."""
    track = np.zeros((len(points), 3))
    if not points:
        return track
    track[:, :2] = [point[:2] for point in points]
    known = {index: point[2] for index, point in enumerate(points) if point[2] is not None}
    known.setdefault(0, 0.0)
    known.setdefault(len(points) - 1, 1.0)
    order = sorted(known)
    for before, after in pairwise(order):
        if known[after] < known[before]:
            raise FlowError(
                f"{at}[{after}].t: expected points in order of time, got {known[after]:g} after "
                f"{known[before]:g}."
            )
    track[:, 2] = np.interp(np.arange(len(points)), order, [known[index] for index in order])
    return track


def _point(item: Any, at: str) -> tuple[float, float, float | None]:
    item = _object(item, at, '{"x": 10, "y": 20}')
    x, y = (_number(item, axis, at, None, -_FAR, _FAR) for axis in "xy")
    return x, y, None if item.get("t") is None else _number(item, "t", at, None, 0, 1)


def _corner(item: Any, at: str) -> tuple[float, float]:
    if not isinstance(item, list) or len(item) != 2:
        raise FlowError(f"{at}: expected a corner, [x, y], got {_shown(item)}.")
    x, y = (_checked(value, f"{at}[{index}]", -_FAR, _FAR) for index, value in enumerate(item))
    return x, y


def _run(item: Any, at: str) -> int:
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= _SIDE * _SIDE:
        raise FlowError(f"{at}: expected a whole number of pixels, got {_shown(item)}.")
    return item


def _key(item: Any, at: str) -> CameraKey:
    item = _object(item, at)
    return CameraKey(
        t=_number(item, "t", at, 0.0, 0, 1),
        x=_number(item, "x", at, 0.0, -_FAR, _FAR),
        y=_number(item, "y", at, 0.0, -_FAR, _FAR),
        zoom=_number(item, "zoom", at, 1.0, 1 / _ZOOM, _ZOOM),
        roll=_number(item, "roll", at, 0.0, -_ROLL, _ROLL),
    )


def _each(
    item: dict[str, Any], name: str, at: str, most: int, read: Callable[[Any, str], _Item]
) -> tuple[_Item, ...]:
    at = _at(at, name)
    values = item.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise FlowError(f"{at}: expected a list, got {_shown(values)}.")
    if len(values) > most:
        raise FlowError(f"{at}: expected at most {most}, got {len(values)}.")
    return tuple(read(value, f"{at}[{index}]") for index, value in enumerate(values))


def _object(item: Any, at: str, example: str = "") -> dict[str, Any]:
    if not isinstance(item, dict):
        like = f" like {example}" if example else ""
        raise FlowError(f"{at}: expected an object{like}, got {_shown(item)}.")
    return item


def _choice(item: dict[str, Any], name: str, at: str, among: tuple[str, ...], default: str) -> str:
    value = item.get(name)
    if value is None:
        return default
    if value not in among:
        raise FlowError(
            f"{_at(at, name)}: expected one of {', '.join(among)}, got {_shown(value)}."
        )
    return str(value)


def _whole(item: dict[str, Any], name: str, at: str, default: int, most: int) -> int:
    value = _number(item, name, at, float(default), 1, most)
    if value != int(value):
        raise FlowError(f"{_at(at, name)}: expected a whole number, got {value:g}.")
    return int(value)


def _number(
    item: dict[str, Any], name: str, at: str, default: float | None, low: float, high: float
) -> float:
    value = item.get(name)
    if value is None:
        value = default
    return _checked(value, _at(at, name), low, high)


def _checked(value: Any, at: str, low: float, high: float) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise FlowError(f"{at}: expected a number from {low:g} to {high:g}, got {_shown(value)}.")
    return float(value)


def _at(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)}"
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "…"
