"""What the paper reports (arXiv 2403.13408, tables 1 and 2): FVD on MHAD and on MUG."""

from __future__ import annotations

TABLE_1 = {
    "S2DM, given flow": {"mhad": 99.02, "mug": 95.98},
    "S2DM, two stages": {"mhad": 128.26, "mug": 111.74},
    "LFDM": {"mhad": 148.58, "mug": 105.04},
    "LVDM": {"mhad": 257.94, "mug": 153.11},
    "VDM": {"mhad": 642.48, "mug": 367.65},
}

TABLE_2 = {
    ("shared", "shared"): {"mhad": 99.02, "mug": 95.98},
    ("shared", "independent"): {"mhad": 102.81, "mug": 124.98},
    ("independent", "independent"): {"mhad": 114.28, "mug": 130.07},
}
"""By the noise in training and in sampling."""
