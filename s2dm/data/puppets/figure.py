"""The look of a person: one texture for each rigid piece.

Pieces have their origin at the joint they hang from, with y along the limb (downwards at rest) and
x to image right.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .paint import Array, Canvas, box, capsule, ellipse, trunk
from .persons import TOP_COLOURS, TROUSER_COLOURS, Colour, Person
from .skeleton import Body

_DARK = (0.13, 0.11, 0.12)
_SHOES: tuple[Colour, ...] = (
    (0.22, 0.18, 0.18), (0.90, 0.90, 0.88), (0.55, 0.32, 0.18), (0.78, 0.22, 0.24),
)  # fmt: skip


class Wardrobe:
    """Paints the pieces of one person for one clip.

    Args:
        person, measures: who.
        index: the person's number; it seeds the weave of the cloth and picks the shoes.
        density: texels per unit.
        light: (3,) direction to the light: image right, down, towards the viewer.
        turn: degrees by which the figure faces image right.
    """

    def __init__(
        self,
        person: Person,
        measures: Body,
        index: int,
        density: float,
        light: Array,
        turn: float,
    ) -> None:
        self._who, self._body, self._index = person, measures, index
        self._density, self._light = density, light
        self._turn = np.sin(np.radians(turn))
        self._top = TOP_COLOURS[person.top_colour]
        self._sleeve = _shaded(self._top, 0.86)
        self._trim = _mix(self._top, _DARK if sum(self._top) > 1.7 else (1, 1, 1), 0.5)
        self._trousers = TROUSER_COLOURS[person.trousers_colour]

    def paint(self, name: str, matrix: Array) -> Canvas:
        """The texture of the piece `name`, lit as it is placed by `matrix` (2,2) in frame 1."""
        side, _, kind = name.partition("_")
        if not kind:
            kind = name
        canvas = self._canvas(kind, matrix)
        getattr(self, f"_{kind}")(canvas, 1.0 if side == "left" else -1.0)
        return canvas

    def _canvas(self, kind: str, matrix: Array) -> Canvas:
        b = self._body
        bounds = {
            "torso": (-15, -5, 15, b.trunk + 12),
            "pelvis": (-12, -6, 12, 9),
            "head": (-19, -33, 19, 9),
            "upper_arm": (-7, -7, 7, b.upper_arm + 7),
            "forearm": (-7, -7, 7, b.forearm + 6),
            "hand": (-6, -4, 6, 8),
            "thigh": (-9, -9, 9, b.thigh + 8),
            "shin": (-8, -8, 8, b.shin + 6),
            "foot": (-12, -5, 12, 7),
        }[kind]
        axes = matrix / np.linalg.norm(matrix, axis=0)
        x, y = np.linalg.solve(axes, self._light[:2])
        return Canvas(bounds, self._density, np.array([x, y, self._light[2]]))

    # -- cloth ---------------------------------------------------------------------------------

    def _weave(self, canvas: Canvas, amount: float) -> None:
        """Soft irregular mottling, different for each person: something for the eye to follow."""
        rng = np.random.default_rng((11, self._index, int(canvas.y.size)))
        cloth = np.zeros_like(canvas.alpha)
        for _ in range(5):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            wave = 2 * np.pi / rng.uniform(5.0, 11.0)
            cloth += np.sin(wave * (canvas.x * np.cos(angle) + canvas.y * np.sin(angle)) + phase)
        canvas.tint(1 + amount * cloth / 2)

    def _pattern(self, canvas: Canvas, distance: Array) -> None:
        """The pattern of the top, inside the shape `distance`."""
        light = sum(self._top) > 1.7
        other = _mix(self._top, _DARK if light else (1, 1, 1), 0.45 if light else 0.55)
        pattern = self._who.pattern
        if pattern == "stripes":
            mask = 1.3 - np.abs((canvas.y + 1.0) % 6.5 - 3.25)
        elif pattern == "checks":
            mask = np.maximum(
                0.9 - np.abs((canvas.y + 1.0) % 6.0 - 3.0),
                0.9 - np.abs(canvas.x % 6.0 - 3.0),
            )
        elif pattern == "dots":
            row = np.floor(canvas.y / 4.5)
            x = (canvas.x + 2.6 * (row % 2)) % 5.2 - 2.6
            mask = 1.15 - np.hypot(x, canvas.y % 4.5 - 2.25)
        else:
            return
        canvas.fill(np.maximum(-mask, distance), other, inside=True)

    def _stroke(self, canvas: Canvas, points, colour: Colour, width: float = 0.5) -> None:
        for (ax, ay), (bx, by) in pairwise(points):
            canvas.fill(capsule(canvas, ax, ay, bx, by, width, width), colour, inside=True)

    # -- trunk ---------------------------------------------------------------------------------

    def _torso(self, canvas: Canvas, side: float) -> None:
        who, b = self._who, self._body
        top, dark, pale = self._top, _shadow(self._top), _mix(self._top, (1, 1, 1), 0.5)
        # The skin of the neck, then the cloth.
        canvas.fill(box(canvas, 0, 0, 3.4, 5.0, 2.0), _mix(who.skin, _DARK, 0.12), round=4)
        hem = {"coat": 8.0, "jacket": 1.5, "hoodie": 2.5}.get(who.top, 2.0)
        bottom = b.trunk + hem
        rows = canvas.y
        waist = b.trunk * 0.72
        flare = b.waist + (2.6 if who.top == "coat" else 1.0)
        widths = np.where(
            rows < waist,
            b.shoulder + (b.waist - b.shoulder) * _ease(rows / waist),
            b.waist + (flare - b.waist) * _ease((rows - waist) / (bottom - waist)),
        )
        shape = trunk(canvas, widths, 0.3, bottom, 4.2)
        canvas.fill(shape, top, round=8.5)
        self._pattern(canvas, shape)
        middle = 6.0 * self._turn
        if who.top in ("coat", "jacket"):
            inner = (0.93, 0.92, 0.88) if sum(top) < 2.4 else (0.35, 0.45, 0.62)
            opening = np.maximum(np.abs(canvas.x - middle) - (4.6 - canvas.y * 0.36), canvas.y - 13)
            canvas.fill(opening, inner, inside=True)
            for s in (-1, 1):
                self._stroke(canvas, [(middle + s * 4.8, 0), (middle + s * 0.3, 12.5)], dark, 0.8)
            self._stroke(canvas, [(middle, 12.5), (middle, bottom)], dark, 0.55)
            for y in np.arange(15.5, bottom - 2, 5.5):
                canvas.fill(ellipse(canvas, middle + 2.2, y, 1.0, 1.0), pale, inside=True)
            for s in (-1, 1):
                self._stroke(canvas, [(s * 6.4 - 2, b.trunk - 4), (s * 6.4 + 2, b.trunk - 4)], dark)
        elif who.top == "shirt":
            self._stroke(canvas, [(middle, 3), (middle, bottom)], dark, 0.5)
            for y in np.arange(6.0, bottom - 1, 5.0):
                canvas.fill(ellipse(canvas, middle + 0.1, y, 0.9, 0.9), pale, inside=True)
            pocket = box(canvas, middle + 5.2, 11.0, 2.4, 2.6, 0.8)
            canvas.fill(np.abs(pocket) - 0.35, dark, inside=True)
            for s in (-1, 1):
                collar = capsule(canvas, middle + s * 3.6, 0.6, middle + s * 1.2, 3.6, 1.3, 0.9)
                canvas.fill(collar, pale, inside=True)
        elif who.top == "hoodie":
            canvas.fill(ellipse(canvas, middle * 0.7, 1.0, 7.0, 4.0), dark, inside=True)
            canvas.fill(ellipse(canvas, middle * 0.7, 0.3, 4.2, 3.0), who.skin, inside=True)
            for s in (-1, 1):
                self._stroke(
                    canvas, [(middle + s * 2, 4), (middle + s * 2.2, 11)], (0.96, 0.96, 0.93), 0.55
                )
            pouch = trunk(canvas, 5.0 + (canvas.y - 17) * 0.25, 17.5, b.trunk - 2, 1.0)
            canvas.fill(np.abs(pouch) - 0.45, dark, inside=True)
            self._band(canvas, shape, b.trunk - 0.5, bottom, dark)
        elif who.top == "jumper":
            canvas.fill(ellipse(canvas, middle * 0.7, 0.2, 5.0, 3.6), dark, inside=True)
            canvas.fill(ellipse(canvas, middle * 0.7, -0.4, 3.8, 2.6), who.skin, inside=True)
            self._band(canvas, shape, b.trunk - 1.0, bottom, dark)
        else:  # t-shirt
            canvas.fill(ellipse(canvas, middle * 0.7, 0.0, 4.6, 3.6), who.skin, inside=True)
            badge = (0.98, 0.82, 0.25) if who.top_colour != "orange" else (0.20, 0.42, 0.80)
            centre = middle, 12.5
            canvas.fill(ellipse(canvas, *centre, 4.6, 4.6), badge, inside=True)
            other = (0.80, 0.20, 0.22) if who.gender == "man" else (0.98, 0.98, 0.96)
            canvas.fill(_star(canvas, *centre, 3.2), other, inside=True)
        self._weave(canvas, 0.035)

    def _band(self, canvas: Canvas, shape: Array, start: float, end: float, colour: Colour) -> None:
        canvas.fill(np.maximum(shape, start - canvas.y), colour, inside=True)

    def _stripe(self, canvas: Canvas, shape: Array, y: float, half: float) -> None:
        canvas.fill(np.maximum(shape, np.abs(canvas.y - y) - half), self._trim, inside=True)

    def _pelvis(self, canvas: Canvas, side: float) -> None:
        b = self._body
        width = b.hip + 4.9 * b.girth
        canvas.fill(box(canvas, 0, 1.0, width, 6.0, 3.5), self._trousers, round=7)
        self._stroke(canvas, [(-12, -2.6), (12, -2.6)], (0.30, 0.19, 0.12), 1.0)
        canvas.fill(
            box(canvas, 6 * self._turn, -2.6, 1.6, 1.3, 0.4), (0.90, 0.78, 0.35), inside=True
        )
        self._weave(canvas, 0.03)

    # -- limbs ---------------------------------------------------------------------------------

    def _upper_arm(self, canvas: Canvas, side: float) -> None:
        b, who = self._body, self._who
        radius = 5.3 * b.girth
        shape = capsule(canvas, 0, 0, 0, b.upper_arm, radius, radius * 0.88)
        if who.short_sleeves:
            canvas.fill(
                capsule(canvas, 0, 0, 0, b.upper_arm, radius * 0.85, radius * 0.74),
                who.skin, round=radius,
            )  # fmt: skip
            sleeve = capsule(canvas, 0, 0, 0, b.upper_arm, radius * 1.05, radius * 1.15)
            sleeve = np.maximum(sleeve, canvas.y - b.upper_arm * 0.62)
            canvas.fill(sleeve, self._sleeve, round=radius)
            self._band(canvas, sleeve, b.upper_arm * 0.62 - 1.8, 0, self._trim)
        else:
            canvas.fill(shape, self._sleeve, round=radius)
            self._pattern(canvas, shape)
            if who.pattern == "plain":
                self._stripe(canvas, shape, b.upper_arm * 0.55, 1.5)
        self._weave(canvas, 0.05)

    def _forearm(self, canvas: Canvas, side: float) -> None:
        b, who = self._body, self._who
        radius = 4.8 * b.girth
        if who.short_sleeves:
            shape = capsule(canvas, 0, 0, 0, b.forearm, radius * 0.82, radius * 0.68)
            canvas.fill(shape, who.skin, round=radius)
            if side > 0:  # a watch
                watch = np.maximum(shape, np.abs(canvas.y - b.forearm + 1.0) - 1.2)
                canvas.fill(watch, _DARK, inside=True)
            return
        shape = capsule(canvas, 0, 0, 0, b.forearm, radius, radius * 0.90)
        shape = np.maximum(shape, canvas.y - b.forearm - 0.6)
        canvas.fill(shape, self._sleeve, round=radius)
        self._pattern(canvas, shape)
        if who.pattern == "plain":
            self._stripe(canvas, shape, b.forearm * 0.30, 1.1)
        self._band(canvas, shape, b.forearm - 2.6, b.forearm, self._trim)
        self._weave(canvas, 0.05)

    def _hand(self, canvas: Canvas, side: float) -> None:
        skin = self._who.skin
        thumb = capsule(canvas, -side * 1.4, 1.2, -side * 3.6, 3.4, 1.5, 1.3)
        canvas.fill(thumb, skin, round=2)
        canvas.fill(capsule(canvas, 0, 0.6, 0, 3.8, 2.9, 3.3), skin, round=3.2)
        for x in (-0.9, 0.9):
            canvas.fill(
                capsule(canvas, x, 4.6, x, 7.4, 0.28, 0.28), _mix(skin, _DARK, 0.35), inside=True
            )

    def _thigh(self, canvas: Canvas, side: float) -> None:
        b, who = self._body, self._who
        radius = 6.0 * b.girth
        if who.short_legs:
            canvas.fill(
                capsule(canvas, 0, 0, 0, b.thigh, radius * 0.8, radius * 0.66), who.skin, round=6
            )
            shape = capsule(canvas, 0, 0, 0, b.thigh, radius, radius * 1.05)
            shape = np.maximum(shape, canvas.y - b.thigh * 0.80)
            canvas.fill(shape, self._trousers, round=radius)
            self._band(canvas, shape, b.thigh * 0.80 - 1.4, 0, _shadow(self._trousers))
        else:
            shape = capsule(canvas, 0, 0, 0, b.thigh, radius, radius * 0.88)
            canvas.fill(shape, self._trousers, round=radius)
        seam = _mix(self._trousers, (0.95, 0.72, 0.35) if who.trousers == "jeans" else _DARK, 0.5)
        if who.trousers == "jeans":
            self._stroke(canvas, [(side * 4.4, -2), (side * 1.0, 2.6), (-side * 0.5, 2.8)], seam)
            self._faded(canvas, b.thigh * 0.62)
        else:
            self._stroke(canvas, [(side * 3.0, 0), (side * 4.2, 4.5)], seam)
            self._stroke(canvas, [(0, 5), (0, b.thigh * (0.7 if who.short_legs else 1))], seam, 0.3)
        self._weave(canvas, 0.035)

    def _shin(self, canvas: Canvas, side: float) -> None:
        b, who = self._body, self._who
        radius = 5.2 * b.girth
        if who.short_legs:
            shape = capsule(canvas, 0, 0, 0, b.shin, radius * 0.76, radius * 0.60)
            canvas.fill(shape, who.skin, round=radius)
            sock = np.maximum(shape - 0.5, b.shin * 0.62 - canvas.y)
            canvas.fill(sock, (0.94, 0.94, 0.92), round=radius)
            for y in (0.68, 0.78):
                stripe = np.maximum(sock, np.abs(canvas.y - b.shin * y) - 0.5)
                canvas.fill(stripe, self._top, inside=True)
            return
        shape = capsule(canvas, 0, 0, 0, b.shin, radius, radius * 0.88)
        shape = np.maximum(shape, canvas.y - b.shin - 1.2)
        canvas.fill(shape, self._trousers, round=radius)
        if who.trousers == "jeans":
            self._faded(canvas, b.shin * 0.2)
            self._band(canvas, shape, b.shin - 1.6, 0, _mix(self._trousers, (1, 1, 1), 0.35))
        else:
            self._stroke(canvas, [(0, 0), (0, b.shin)], _mix(self._trousers, _DARK, 0.5), 0.3)
        self._weave(canvas, 0.035)

    def _faded(self, canvas: Canvas, y: float) -> None:
        """The worn patch on the knee and thigh of jeans."""
        patch = np.exp(-((canvas.x / 3.2) ** 2) - ((canvas.y - y) / 6.0) ** 2)
        canvas.tint(1 + 0.22 * patch)

    def _foot(self, canvas: Canvas, side: float) -> None:
        shoe = _SHOES[self._index % len(_SHOES)]
        reach = 5.5 * self._turn
        toe = side * 0.8 * (1 - abs(self._turn)) + reach
        canvas.fill(capsule(canvas, 0, 0.2, toe, 1.6, 4.0, 3.6), shoe, round=4)
        sole = np.maximum(capsule(canvas, 0, 0.2, toe, 1.6, 4.1, 3.7), 3.2 - canvas.y)
        canvas.fill(sole, _mix(shoe, (1, 1, 1) if sum(shoe) < 2 else _DARK, 0.5), inside=True)
        for y in (-0.4, 1.2):
            self._stroke(
                canvas, [(toe * 0.8 - 1.4, y), (toe * 0.8 + 1.4, y)],
                _mix(shoe, (1, 1, 1) if sum(shoe) < 2 else _DARK, 0.6), 0.35,
            )  # fmt: skip

    # -- head ----------------------------------------------------------------------------------

    def _head(self, canvas: Canvas, side: float) -> None:
        who = self._who
        hair, skin = who.hair_colour, who.skin
        dark_hair = _mix(hair, _DARK, 0.35)
        cy = -12.2
        shift, narrow = 4.6 * self._turn, 1 - 0.25 * abs(self._turn)
        back = -3.0 * self._turn
        style = who.hair
        if style == "long":
            canvas.fill(box(canvas, back, -8.0, 11.4, 14.0, 9.0), dark_hair, round=6)
        elif style == "bob":
            canvas.fill(box(canvas, back, -11.5, 11.8, 11.0, 8.0), dark_hair, round=6)
        elif style == "tail":
            tail = capsule(canvas, 6 + back * 2, -20, 13 + back * 2.6, -7, 4.0, 2.4)
            canvas.fill(tail, hair, round=4)
        elif style == "bun":
            canvas.fill(ellipse(canvas, back, -25.6, 5.4, 5.0), hair, round=5)
        for s in (-1, 1):
            x = s * 9.6 * narrow - shift * 0.7
            if abs(x) < 10.5:
                canvas.fill(ellipse(canvas, x, cy + 1.0, 2.0, 2.7), skin, round=2.5)
        face = ellipse(canvas, 0, cy, 10.0, 11.4)
        canvas.fill(face, skin, round=8)
        self._face(canvas, shift, narrow, cy)
        self._hair(canvas, style, cy, shift, back)
        if who.glasses:
            for s in (-1, 1):
                lens = ellipse(canvas, shift + s * 4.1 * narrow, cy + 0.2, 3.2 * narrow, 3.0)
                canvas.fill(lens, (0.85, 0.93, 1.0), inside=True, strength=0.25)
                canvas.fill(np.abs(lens) - 0.5, _DARK, inside=True)
            self._stroke(canvas, [(shift - 1.0, cy), (shift + 1.0, cy)], _DARK, 0.5)
            self._stroke(canvas, [(shift + 7.0 * narrow, cy), (9.8, cy - 0.8)], _DARK, 0.45)
            self._stroke(canvas, [(shift - 7.0 * narrow, cy), (-9.8, cy - 0.8)], _DARK, 0.45)

    def _face(self, canvas: Canvas, shift: float, narrow: float, cy: float) -> None:
        who = self._who
        deep = _mix(who.skin, (0.55, 0.15, 0.10), 0.35)
        for s in (-1, 1):
            x = shift + s * 4.1 * narrow
            blush = ellipse(canvas, x + s * 1.6, cy + 4.6, 2.6 * narrow, 1.7)
            canvas.fill(blush, _mix(who.skin, (0.95, 0.30, 0.30), 0.5), inside=True, strength=0.55)
            canvas.fill(ellipse(canvas, x, cy + 0.3, 2.1 * narrow, 2.2), (1, 1, 1), inside=True)
            canvas.fill(
                ellipse(canvas, x + 0.4 * self._turn, cy + 0.4, 1.45 * narrow, 1.8), _DARK,
                inside=True,
            )  # fmt: skip
            canvas.fill(ellipse(canvas, x - 0.5, cy - 0.3, 0.5, 0.5), (1, 1, 1), inside=True)
            brow = _mix(who.hair_colour, _DARK, 0.45)
            self._stroke(
                canvas,
                [(x - 2.0 * narrow, cy - 3.4 - 0.25 * s), (x + 2.0 * narrow, cy - 3.4 + 0.25 * s)],
                brow, 0.65 if who.gender == "man" else 0.45,
            )  # fmt: skip
            if who.gender == "woman":
                self._stroke(canvas, [(x, cy - 1.8), (x + s * 2.3, cy - 1.2)], _DARK, 0.45)
        canvas.fill(ellipse(canvas, shift * 1.15, cy + 3.4, 1.2, 1.0), deep, inside=True)
        mouth = ellipse(canvas, shift, cy + 5.2, 3.4 * narrow, 2.9)
        mouth = np.maximum(mouth, cy + 5.7 - canvas.y)
        lips = (0.80, 0.25, 0.28) if who.gender == "woman" else (0.55, 0.20, 0.18)
        canvas.fill(mouth, lips, inside=True)

    def _hair(self, canvas: Canvas, style: str, cy: float, shift: float, back: float) -> None:
        hair = self._who.hair_colour
        cap = ellipse(canvas, back * 0.35, cy - 0.4, 11.0, 12.2)
        line = cy - 5.0  # the hairline
        if style in ("cap", "beanie"):
            accent = _mix(self._trousers, (0.95, 0.25, 0.25), 0.6)
            temples = np.maximum(
                cap, np.maximum(canvas.y - cy - 1.5, 8.4 - np.abs(canvas.x - shift))
            )
            canvas.fill(temples, hair, round=6)
            hat = np.maximum(ellipse(canvas, 0, cy - 1.0, 11.4, 13.2), canvas.y - line - 0.4)
            canvas.fill(hat, accent, round=8)
            if style == "cap":
                peak = ellipse(canvas, shift * 1.6, line + 0.2, 9.6, 2.3)
                canvas.fill(peak, _shadow(accent), round=2.5)
                canvas.fill(
                    ellipse(canvas, shift * 1.3, line - 5, 2.2, 2.2), (1, 1, 1), inside=True
                )
            else:
                self._band(canvas, hat, line - 3.0, 0, _mix(accent, (1, 1, 1), 0.45))
                canvas.fill(ellipse(canvas, 0, cy - 14.8, 3.2, 3.0), (0.96, 0.95, 0.92), round=3)
        elif style == "bald":
            ring = np.maximum(cap, np.maximum(cy - 4.5 - canvas.y, canvas.y - cy - 1.8))
            ring = np.maximum(ring, 8.7 - np.abs(canvas.x - shift * 0.8))
            canvas.fill(ring, hair, round=3)
            beard = np.maximum(ellipse(canvas, 0, cy + 0.4, 10.4, 11.9), cy + 2.2 - canvas.y)
            beard = np.maximum(beard, -ellipse(canvas, shift, cy + 2.4, 6.4, 6.6))
            canvas.fill(beard, hair, round=6)
        elif style == "curly":
            for k in range(9):
                a = np.pi * (0.02 + 0.96 * k / 8)
                canvas.fill(
                    ellipse(canvas, -9.4 * np.cos(a) + back, cy - 2.4 - 8.6 * np.sin(a), 4.0, 4.0),
                    hair, round=4,
                )  # fmt: skip
            canvas.fill(ellipse(canvas, back * 0.5, cy - 8.6, 8.6, 4.6), hair, round=5)
        else:
            sweep = line + 2.2 * np.sin(
                (canvas.x - shift) * 0.22 + (0.9 if style == "short" else 2.2)
            )
            front = np.maximum(cap, canvas.y - sweep)
            sides = np.maximum(
                np.maximum(cap, canvas.y - cy - (2.0 if style == "short" else 5.5)),
                8.3 - np.abs(canvas.x - shift * 0.8),
            )
            canvas.fill(np.minimum(front, sides), hair, round=6)
            if style == "tail":
                canvas.fill(
                    ellipse(canvas, 7 + back * 2, -20.4, 2.0, 2.0), (0.9, 0.3, 0.4), round=2
                )
            for x in (-5.0, -0.5, 4.0):  # strands
                self._strand(canvas, x + back * 0.4, cy, hair)

    def _strand(self, canvas: Canvas, x: float, cy: float, hair: Colour) -> None:
        strand = capsule(canvas, x, cy - 10.5, x - 1.6, cy - 6.6, 0.45, 0.3)
        canvas.fill(strand, _mix(hair, (1, 1, 1), 0.22), inside=True)


def _star(canvas: Canvas, x: float, y: float, radius: float) -> Array:
    """Signed distance, roughly, to a five-pointed star."""
    dx, dy = canvas.x - x, canvas.y - y
    angle = np.arctan2(dx, -dy) % (2 * np.pi / 5)
    bump = np.abs(angle - np.pi / 5) / (np.pi / 5)
    return np.hypot(dx, dy) - radius * (0.5 + 0.5 * bump**1.3)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))


def _shadow(colour: Colour) -> Colour:
    """A visibly different shade of the same cloth: darker, or lighter if it is nearly black."""
    return _shaded(colour, 0.72)


def _shaded(colour: Colour, factor: float) -> Colour:
    if sum(colour) < 0.7:
        return _mix(colour, (1, 1, 1), 0.9 * (1 - factor))
    return tuple(factor * c for c in colour)


def _ease(t: Array) -> Array:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)
