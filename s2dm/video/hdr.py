"""High dynamic range and wide gamuts, as an ordinary screen (sRGB) shows them.

A signal becomes light by the curve of its transfer, the light moves from the file's primaries to
those of BT.709, highlights are rolled off, and the sRGB curve makes a signal of it again. Light
is counted in multiples of the reference white of BT.2408, 203 cd/m², which becomes the white of
the screen:

- PQ (BT.2100) says how much light a pixel has.
- HLG (BT.2100) says what the camera saw: its light is left as it is, by a system gamma of 1, which
  BT.2390 gives for a display of some 330 cd/m². (The usual 1.2 is for one of 1000.) A grey card
  of 18 % then has 18 % of the light of white, as in any photo. White is a signal of 75 %.
- What is no HDR keeps its curve, and only its primaries change.

Up to 94 % of the signal colours stay exactly as they are; white and the highlights above it
share the rest, each pixel dimmed as a whole so that its hue stays.
"""

from __future__ import annotations

import functools

import numpy as np

PQ, HLG = 16, 18
"""Transfer characteristics of HDR by their numbers in ITU-T H.273."""

_WHITE = 203.0  # cd/m²
_KNEE = 0.94  # of the signal

# Everything is looked up in tables, and by so many rows at a time, for 4K in seconds.
_ROWS = 32
_GAIN_STEPS = 4096
_BRIGHTEST = 100  # in multiples of white; PQ's brightest is 49, of one primary of BT.2020 82

_TO_BT709 = {
    9: np.array(  # BT.2020, by BT.2087
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    ),
    12: np.array(  # Display P3, from its primaries (SMPTE EG 432-1)
        [[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0983]]
    ),
}


def needs_conversion(transfer: int, primaries: int) -> bool:
    """Whether `to_srgb` has anything to do (numbers of ITU-T H.273)."""
    return transfer in (PQ, HLG) or primaries in _TO_BT709


def to_srgb(signal: np.ndarray, top: int, transfer: int, primaries: int) -> np.ndarray:
    """A picture of high dynamic range or of a wide gamut for an ordinary screen.

    Args:
        signal: (H, W, 3) uint16, R'G'B' as the file has it.
        top: the number that is the full signal, 1.
        transfer: of the file: PQ or HLG; any other has the range of a screen.
        primaries: of the file. HDR that names none has those of BT.2020.

    Returns:
        (H, W, 3) uint8, of the primaries of BT.709.
    """
    hdr = transfer in (PQ, HLG)
    if hdr and primaries not in (1, *_TO_BT709):
        primaries = 9
    matrix = _TO_BT709.get(primaries, np.eye(3)).T.astype(np.float32)
    curve, codes, gains = _curve(top, transfer), _codes(), _gains()
    result = np.empty(signal.shape, np.uint8)
    for top_row in range(0, len(signal), _ROWS):
        rows = slice(top_row, top_row + _ROWS)
        light = curve[signal[rows]] @ matrix
        if hdr:
            brightest = np.maximum(np.maximum(light[..., 0], light[..., 1]), light[..., 2])
            light *= gains[(brightest * _GAIN_STEPS).round().astype(np.int32)][..., None]
        result[rows] = codes[(light.clip(0, 1) * 0xFFFF).round().astype(np.uint16)]
    return result


@functools.cache
def _curve(top: int, transfer: int) -> np.ndarray:
    """The light of each of the 2¹⁶ signals, in multiples of white, as float32."""
    signal = np.minimum(np.arange(1 << 16) / top, 1)
    if transfer == PQ:
        light = _pq(signal) / _WHITE
    elif transfer == HLG:
        light = _hlg(signal) / _hlg(0.75)
    else:
        light = _to_light(signal)
    return light.astype(np.float32)


@functools.cache
def _codes() -> np.ndarray:
    """The sRGB of light in 2¹⁶ steps up to white, as uint8."""
    light = np.arange(1 << 16) / 0xFFFF
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (signal * 255).round().astype(np.uint8)


@functools.cache
def _gains() -> np.ndarray:
    """By how much a pixel is dimmed that is so bright, in `_GAIN_STEPS` a white, as float32."""
    light = np.arange(1, _BRIGHTEST * _GAIN_STEPS) / _GAIN_STEPS
    signal = 1.055 * light ** (1 / 2.4) - 0.055
    above = np.maximum(signal - _KNEE, 0) / (1 - _KNEE)
    rolled = _to_light(_KNEE + (1 - _KNEE) * above / (1 + above))
    gains = np.where(signal > _KNEE, rolled / light, 1)
    return np.concatenate([[1], gains]).astype(np.float32)


def _pq(signal: np.ndarray) -> np.ndarray:
    """The EOTF of PQ, in cd/m² (BT.2100, table 4)."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg(signal: np.ndarray | float) -> np.ndarray:
    """The inverse OETF of HLG, in parts of the brightest light (BT.2100, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(
        np.less_equal(signal, 0.5), np.square(signal) / 3, (np.exp((signal - c) / a) + b) / 12
    )


def _to_light(signal: np.ndarray) -> np.ndarray:
    """The curve of sRGB (IEC 61966-2-1)."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
