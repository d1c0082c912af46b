"""The benchmark of flow estimators: its figures and its section of the results page."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("diffusers")

from s2dm.data import Clip
from s2dm.flow import FlowField

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import flow_estimators
import report


def clip() -> Clip:
    """Everything moves by two pixels, and a column comes in that frame 1 doesn't show."""
    displacement = torch.zeros(2, 2, 16, 16)
    displacement[1, 0] = -2
    occlusion = torch.zeros(2, 1, 16, 16)
    occlusion[1, :, :, :2] = 1
    return Clip(
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8), FlowField(displacement, occlusion), ""
    )


def test_figures_of_flow_that_is_known():
    exact = flow_estimators.measure([clip()], lambda clip: clip.flow)
    assert exact == pytest.approx({"flow_error": 0, "hidden_found": 1, "seen_hidden": 0})
    half = flow_estimators.measure([clip()], lambda clip: clip.flow.scale(0.5))
    assert half["flow_error"] == pytest.approx(0.5)
    still = flow_estimators.measure([clip()], lambda clip: clip.flow.scale(0))
    assert still["flow_error"] == pytest.approx(1)


def test_the_results_page_has_a_section_for_them():
    rows = {
        "dis": {"flow_error": 0.14, "hidden_found": 0.6, "seen_hidden": 0.01},
        "region motion": {"flow_error": 0.5, "hidden_found": 0.4, "seen_hidden": 0.02},
    }
    protocol = {"command": "python benchmarks/flow_estimators.py", "code": "0.1.0"}
    page = report.SECTIONS["flow_estimators"]({"protocol": protocol, "table": {"usual": rows}})
    assert "| usual | dis | 0.14 | 0.60 | 0.01 |" in page
    assert "| usual | region motion | 0.50 | 0.40 | 0.02 |" in page
