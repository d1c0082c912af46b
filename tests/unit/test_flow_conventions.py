"""Flow files of other tools, which mean something else by the same bytes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from s2dm.flow import FlowError, FlowField, load_flow, save_flow

SHIFT = 2.0  # pixels from each frame to the next, to the right


def write_flo(path: Path, shift: float) -> None:
    """As Middlebury has it: magic, width, height, then x and y of each pixel."""
    flow = np.zeros((4, 6, 2), "<f4")
    flow[..., 0] = shift
    path.write_bytes(b"PIEH" + np.array([6, 4], "<i4").tobytes() + flow.tobytes())


def moving(frames: int) -> FlowField:
    displacement = torch.zeros(frames, 2, 4, 6)
    displacement[:, 0] = -SHIFT * torch.arange(frames).view(-1, 1, 1)
    return FlowField(displacement, torch.zeros(frames, 1, 4, 6))


def test_pairwise_flow_is_refused_with_the_convention_and_no_false_remedy(tmp_path):
    """Three files between four frames, as RAFT, Sintel and most tools have them."""
    for number in range(1, 4):
        write_flo(tmp_path / f"{number:05d}.flo", SHIFT)
    with pytest.raises(FlowError) as error:
        load_flow(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / '00001.flo'}: expected zeros")
    assert "every file says where the pixels of its frame were in frame 1" in message
    assert "got flow of up to 2 pixels" in message
    assert "a file of zeros before it doesn't help" in message
    assert 'measured to the "previous frame"' in message
    assert "to zero" not in message  # what made wrong flow of it


def test_the_field_gives_no_false_remedy_either():
    with pytest.raises(FlowError, match="expected zeros in frame 1") as error:
        FlowField(torch.ones(2, 2, 4, 4), torch.zeros(2, 1, 4, 4))
    assert "to zero" not in str(error.value)
    assert "from each frame to the next is something else" in str(error.value)


@pytest.mark.parametrize("name", ["pair.flo", "clip"])
def test_what_no_flo_file_says_is_logged(tmp_path, caplog, name):
    field = moving(2)
    save_flow(tmp_path / name, field)
    with caplog.at_level(logging.INFO, "s2dm.flow.files"):
        assert torch.equal(load_flow(tmp_path / name).displacement, field.displacement)
    assert f"{name}: read as flow from each frame back to frame 1" in caplog.text


def test_endings_in_a_folder_may_be_written_large(tmp_path):
    save_flow(tmp_path / "clip", moving(3))
    for file in list((tmp_path / "clip").iterdir()):
        file.rename(file.with_suffix(".FLO"))
    assert torch.equal(load_flow(tmp_path / "clip").displacement, moving(3).displacement)
    save_flow(tmp_path / "clip", moving(2))  # they are no other files
    assert len(load_flow(tmp_path / "clip")) == 2
