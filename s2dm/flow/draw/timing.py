"""Which point of its path a track has reached at every frame."""

from __future__ import annotations

import numpy as np

from .state import Array


def phases(num_frames: int, speed: str, repeat: str = "once", cycles: float = 1.0) -> Array:
    """How far along their paths the tracks are at each frame, (N,) in [0, 1].

    Once, the last frame is at the end. A loop starts anew, and ping-pong turns round, so that
    the frame after the last one would be the first again: the clip can be played in a circle.
    """
    frame = np.arange(num_frames, dtype=np.float64)
    if repeat == "once":
        time = frame / max(num_frames - 1, 1)
    else:
        time = (frame * cycles / num_frames) % 1.0
        if repeat == "ping_pong":
            time = 1 - np.abs(1 - 2 * time)
    return eased(time, speed)


def eased(time: Array, speed: str) -> Array:
    """Time with a slow start, a slow end or both; "linear" and "hold" leave it as it is."""
    if speed == "ease":
        return time * time * (3 - 2 * time)
    if speed == "ease_in":
        return time * time
    if speed == "ease_out":
        return 1 - (1 - time) ** 2
    return time


def positions(track: Array, phase: Array, speed: str) -> Array:
    """Where a track (n,3) is at each of the phases (N,), (N,2).

    It goes straight from point to point, or, with the speed "hold", jumps to each at its time.
    """
    times = track[:, 2]
    if speed == "hold":
        last = np.searchsorted(times, phase + 1e-9, side="right") - 1
        return track[np.clip(last, 0, len(track) - 1), :2]
    return np.stack([np.interp(phase, times, track[:, axis]) for axis in (0, 1)], axis=1)
