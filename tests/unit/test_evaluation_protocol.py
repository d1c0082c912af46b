"""Protocol cards say what was measured, and read back as they were written."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2dm.evaluation import protocol
from s2dm.evaluation.protocol import ProtocolCard, file_hash, protocol_markdown
from s2dm.files import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def card() -> ProtocolCard:
    return ProtocolCard(
        checkpoint="model.safetensors (0123456789ab)",
        features="I3D (SHA-256 ff)",
        clips=24,
        data="puppets, test",
        frames=16,
        size=(128, 96),
        value_range=(0.0, 1.0),
        seeds=range(2),
        notes={"warp error": "of 255"},
    )


def test_card_turns_into_json_and_markdown(card):
    values = card.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["clips"] == 24 and values["size"] == [128, 96] and values["seeds"] == [0, 1]
    assert values["hardware"]["torch"] == torch.__version__
    assert values["hardware"]["threads"] == torch.get_num_threads()
    text = card.to_markdown()
    assert text == protocol_markdown(values)
    for line in (
        "- checkpoint: model.safetensors (0123456789ab)",
        "- size: 128x96",
        "- value range: 0 to 1",
        "- seeds: 0, 1",
        "- warp error: of 255",
    ):
        assert line in text.splitlines()
    assert text.startswith("```\n" + values["command"] + "\n```")


def test_what_does_not_apply_is_left_out():
    values = ProtocolCard(notes={"runs": "5"}).to_dict()
    assert list(values) == ["command", "runs", "code", "hardware"]


def test_hash_is_the_start_of_sha256(tmp_path):
    data = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "weights").write_bytes(data)
    assert file_hash(tmp_path / "weights") == hashlib.sha256(data).hexdigest()[:12]


def test_command_can_be_repeated(monkeypatch):
    for program, expected in (
        (ROOT / "benchmarks" / "speed.py", "python benchmarks/speed.py --steps 2 'a b'"),
        (Path("/usr/local/bin/s2dm"), "s2dm --steps 2 'a b'"),
        (ROOT / "s2dm" / "cli" / "__main__.py", "s2dm --steps 2 'a b'"),
        (Path("/elsewhere/tool.py"), "tool.py --steps 2 'a b'"),
    ):
        monkeypatch.setattr(sys, "argv", [str(program), "--steps", "2", "a b"])
        assert protocol.command_line() == expected


def test_code_version_names_the_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", *who, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(protocol, "_ROOT", tmp_path)
    assert "commit" not in protocol.code_version()
    git("init", "--quiet")
    assert "commit" not in protocol.code_version()  # nothing committed yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()[:12]
    assert protocol.code_version().endswith(f"commit {commit}")
    (tmp_path / "file").write_text("two")
    assert protocol.code_version().endswith(f"commit {commit}+")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"größe": 1})
    assert json.loads(path.read_text("utf-8")) == {"größe": 1}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text("utf-8")) == {"größe": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_what_a_file_holds_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    synced = []

    def fsync(handle: int, fsync=os.fsync) -> None:
        fsync(handle)
        synced.append((os.fstat(handle).st_size, target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(target, [1])
    assert synced == [(target.stat().st_size, False)]
