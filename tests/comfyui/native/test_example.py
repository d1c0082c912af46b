"""The clip and the picture of the workflow templates in ComfyUI's input folder."""

import logging

import pytest

pytestmark = pytest.mark.comfyui


@pytest.fixture
def example(rig, tmp_path, monkeypatch):
    """The module, with an input folder of its own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    return rig.module("nodes.example")


def test_a_file_of_the_users_is_never_replaced(example, tmp_path):
    mine = tmp_path / "input" / example.EXAMPLES[0].name
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    example.place_examples()
    assert mine.read_bytes() == b"mine"


def test_they_are_placed_whole_and_alone(example, tmp_path):
    (tmp_path / "input").mkdir()
    example.place_examples()
    placed = {path.name: path.read_bytes() for path in (tmp_path / "input").iterdir()}
    assert placed == {path.name: path.read_bytes() for path in example.EXAMPLES}


def test_a_folder_that_is_not_there_is_a_warning_and_no_error(example, caplog):
    with caplog.at_level(logging.WARNING):
        example.place_examples()
    assert "was not placed in the input folder" in caplog.text
