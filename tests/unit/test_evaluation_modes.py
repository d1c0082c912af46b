"""The rows of an evaluation, as they are named on the command line."""

from __future__ import annotations

import pytest

from s2dm.evaluation.modes import Variant


@pytest.mark.parametrize("text", ["given-flow", "zero-flow:independent", "two-stage:mixed:0.25"])
def test_rows_are_written_as_they_are_read(text):
    assert str(Variant.parse(text)) == text


def test_rows_say_what_they_are():
    assert Variant.parse("given-flow:shared") == Variant("given-flow")
    assert Variant.parse("two-stage:mixed:0.25").title.endswith("mixed noise (0.25)")
    assert Variant("true").title == "true clip"


@pytest.mark.parametrize(
    "text, message",
    [
        ("dream", "given-flow, two-stage.*'dream'"),
        ("given-flow:alone", "expected one of"),
        ("given-flow:mixed:2", "from 0 to 1, got 2"),
        ("given-flow:mixed:half", "a share"),
        ("given-flow:shared:0.5", "MODE:SHARING"),
        ("true:independent", "no noise to share"),
    ],
)
def test_rows_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Variant.parse(text)
