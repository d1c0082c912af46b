"""Rows of figures with their intervals, and the table that they make."""

from __future__ import annotations

import pytest
import torch

from s2dm.evaluation.clip_metrics import Total
from s2dm.evaluation.tables import markdown_table, save_plots, summarise

pytest.importorskip("matplotlib")


def test_rows_pool_what_was_measured():
    clips = [
        {"flow_error": Total(1.0, 4.0), "flicker": Total(0.0, 0.0)},
        {"flow_error": Total(5.0, 4.0), "flicker": Total(0.0, 0.0)},
    ]
    row = summarise(clips)
    assert row["clips"] == 2 and row["flow_error"] == 0.75
    assert "flicker" not in row  # measured on none
    low, high = row["flow_error_95"]
    assert low < 0.75 < high


def test_distances_have_intervals_of_pairs_and_groups():
    """A row that is its true clips: any pairs drawn from them lie 0 apart, others don't."""
    real = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    totals = [{"motion": Total(float(clip % 6), 1.0)} for clip in range(24)]
    row = summarise(totals, real, real[:, None])
    assert row["fvd_95"] == pytest.approx([0, 0], abs=1e-9)
    width = {None: 0.0, "groups": 0.0}
    for name in width:
        groups = [clip % 6 for clip in range(24)] if name else None
        low, high = summarise(totals, groups=groups)["motion_95"]
        width[name] = high - low
    assert width["groups"] > 1.5 * width[None]  # 6 numbers instead of 24: twice as wide


def test_table_shows_what_there_is(tmp_path):
    table = {
        "a": {"clips": 3, "motion": 2.04, "motion_95": [1.0, 3.0], "given_motion": 4.0,
              "kvd": 1.0, "kvd_95": [0.5, 1.5]},
        "b": {"clips": 4, "motion": 1.0, "motion_95": [1.0, 1.0], "given_motion": 4.0},
    }  # fmt: skip
    lines = markdown_table(table, {"a": "first", "b": "second"}).splitlines()
    assert lines[0] == "| clips | N | motion, pixels (95 %) | KVD (95 %) |"
    assert lines[2] == "| first | 3 | 2.0 of 4.0 (1.0 to 3.0) | 1.00 (0.50 to 1.50) |"
    assert lines[3] == "| second | 4 | 1.0 of 4.0 (1.0 to 1.0) | – |"
    save_plots(tmp_path / "plots.png", table, {"a": "first", "b": "second"})
    assert (tmp_path / "plots.png").stat().st_size > 1000
