"""The cast: every person of the puppet data set, as a table.

A caption names gender, glasses, top and trousers. Hair, skin, build, height and the pattern of the
cloth belong to the person too, so the same person looks the same in every clip.
"""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[float, float, float]

#: Colours of tops, RGB in [0, 1]; the keys are the words used in captions.
TOP_COLOURS: dict[str, Colour] = {
    "red": (0.84, 0.16, 0.17),
    "orange": (0.96, 0.53, 0.12),
    "yellow": (0.97, 0.83, 0.20),
    "green": (0.17, 0.60, 0.28),
    "blue": (0.16, 0.38, 0.82),
    "purple": (0.52, 0.25, 0.70),
    "black": (0.17, 0.17, 0.20),
    "white": (0.95, 0.95, 0.94),
}

#: Colours of trousers, RGB in [0, 1].
TROUSER_COLOURS: dict[str, Colour] = {
    "blue": (0.22, 0.35, 0.62),
    "black": (0.16, 0.16, 0.19),
    "grey": (0.55, 0.57, 0.60),
    "brown": (0.47, 0.30, 0.18),
    "beige": (0.87, 0.78, 0.60),
    "green": (0.27, 0.42, 0.24),
}

_SKIN: tuple[Colour, ...] = (
    (0.99, 0.84, 0.73), (0.93, 0.74, 0.58), (0.78, 0.56, 0.40), (0.58, 0.38, 0.26),
    (0.42, 0.27, 0.19),
)  # fmt: skip

_HAIR: dict[str, Colour] = {
    "dark": (0.15, 0.11, 0.10),
    "brown": (0.40, 0.24, 0.14),
    "blond": (0.90, 0.72, 0.36),
    "ginger": (0.76, 0.36, 0.14),
    "silver": (0.76, 0.77, 0.80),
}


@dataclass(frozen=True)
class Person:
    """One member of the cast; `height` and `build` are factors around 1."""

    gender: str
    glasses: bool
    top: str
    top_colour: str
    pattern: str
    trousers: str
    trousers_colour: str
    hair: str
    hair_colour: Colour
    skin: Colour
    height: float
    build: float

    @property
    def short_sleeves(self) -> bool:
        return self.top == "t-shirt"

    @property
    def short_legs(self) -> bool:
        return self.trousers == "shorts"


# gender, glasses, top colour, top, pattern, trousers colour, trousers, hair, hair colour, skin
# (an index), height, build.
_CAST = """
man   glasses black  coat    plain   blue  jeans    short  brown  0 1.00 1.00
woman -       red    jumper  stripes black trousers long   dark   1 0.96 0.95
man   -       green  hoodie  plain   beige trousers curly  dark   3 1.02 1.05
woman glasses yellow shirt   plain   blue  jeans    bun    ginger 0 0.94 0.96
man   -       white  t-shirt logo    green shorts   short  blond  1 1.03 1.02
woman -       purple coat    plain   grey  trousers bob    brown  2 0.95 1.00
man   glasses blue   shirt   checks  brown trousers short  silver 0 0.98 1.06
woman -       orange t-shirt logo    black shorts   tail   dark   4 0.97 0.94
man   -       red    jacket  plain   grey  jeans    cap    brown  2 1.01 1.04
woman glasses green  jumper  dots    brown trousers bob    blond  0 0.93 0.98
man   -       yellow hoodie  plain   black jeans    beanie dark   4 1.04 0.98
woman -       white  coat    plain   beige trousers long   ginger 1 0.96 0.95
man   glasses purple jumper  stripes blue  jeans    curly  ginger 1 0.99 1.08
woman -       black  t-shirt logo    green trousers tail   blond  0 0.98 0.93
man   -       orange shirt   checks  grey  shorts   bald   dark   3 1.00 1.04
woman glasses blue   jacket  plain   black jeans    long   brown  2 0.95 0.97
man   -       blue   hoodie  plain   grey  trousers short  dark   1 1.05 1.00
woman -       yellow jumper  stripes green trousers bun    dark   3 0.92 1.00
man   glasses white  shirt   plain   brown shorts   cap    blond  0 0.97 1.03
woman -       red    hoodie  plain   blue  jeans    beanie ginger 0 0.96 0.96
man   -       black  jacket  plain   beige trousers bald   brown  4 1.02 1.07
woman glasses orange coat    plain   green trousers bob    silver 1 0.94 0.98
man   -       purple t-shirt logo    beige shorts   curly  brown  2 1.00 0.96
woman -       green  jacket  plain   brown jeans    tail   brown  4 0.97 0.95
"""


def _read(row: str) -> Person:
    (gender, glasses, top_colour, top, pattern, trousers_colour, trousers, hair, hair_colour,
     skin, height, build) = row.split()  # fmt: skip
    return Person(
        gender=gender,
        glasses=glasses == "glasses",
        top=top,
        top_colour=top_colour,
        pattern=pattern,
        trousers=trousers,
        trousers_colour=trousers_colour,
        hair=hair,
        hair_colour=_HAIR[hair_colour],
        skin=_SKIN[int(skin)],
        height=float(height),
        build=float(build),
    )


#: The 24 persons.
PERSONS: tuple[Person, ...] = tuple(_read(row) for row in _CAST.strip().splitlines())
