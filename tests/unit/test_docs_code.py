"""What the pages say of the code: functions that they name exist, commands that they give parse."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from s2dm import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/*.md")]
TRAINERS = {
    "train_vae": "vae",
    "train_text": "text",
    "train_stage1": "stage1",
    "train_stage2": "stage2",
    "train_adapter": "adapter_run",
    "train_region_motion": "region_motion",
}


def named(page: Path) -> Iterator[tuple[str, Path]]:
    """Each `name` of code on a page that is a link, and the file that it leads to."""
    for label, target in re.findall(r"\[(`[^\]]*`)\]\(([^)#]+)\)", page.read_text("utf-8")):
        path = (page.parent / target).resolve()
        if path.suffix == ".py":
            for name in re.findall(r"`([^`]+)`", label):
                yield name, path


def find(name: str, path: Path) -> Any:
    """What `Kind("a").method` is in a file of the library."""
    found = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for part in re.sub(r"\([^)]*\)", "", name).split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_what_a_page_links_to_by_name_is_in_that_file(page: Path) -> None:
    names = [(name, path) for name, path in named(page) if "/" not in name]
    for name, path in names:
        if name.endswith(".py"):
            assert path.name == name
        elif path.is_relative_to(ROOT / "s2dm"):
            found = find(name, path)
            # Not one that the file only imports: readers look for it there.
            module = getattr(found, "__module__", None)
            assert module in (None, ".".join(path.relative_to(ROOT).with_suffix("").parts)), name
    if page.stem == "method":
        assert len(names) > 60


def test_every_statement_of_the_paper_has_a_place_or_a_reason() -> None:
    """The tables of sections 3 and 4: a link, or words of why not, behind each statement."""
    text = (ROOT / "docs" / "method.md").read_text("utf-8")
    _, text = text.split("## The paper, statement by statement")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    headings = [row[0] for row in rows if row[1] == "Here"]
    assert headings == ["Section 3", "Section 4"]
    statements = [row for row in rows if row[1] != "Here"]
    assert len(statements) >= 30
    reasons = ("none", "not stated", "`sheet.jpg`", "`s2dm ")
    for row in statements:
        assert len(row) == 2, row
        assert "](../" in row[1] or row[1].startswith(reasons), row


# ------------------------------------------------------------------------------------ commands


def commands() -> list[list[str]]:
    """Each command on the pages, as words; "…" stands for what readers fill in."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            variables = {}
            for line in lines:
                if re.match(r"[A-Z]+=", line):
                    name, value = shlex.split(line)[0].split("=", 1)
                    variables |= {f'"${name}"': shlex.quote(value), f"${name}": value}
                for name, value in variables.items():
                    line = line.replace(name, value)
                found.append(line)
        found += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    starts = ("s2dm ", "accelerate launch ", "torchrun ", "python ")
    return [shlex.split(line, comments=True) for line in found if line.startswith(starts)]


def of_s2dm() -> list[list[str]]:
    """The words behind `s2dm`, of its own commands and of those that launch several of it."""
    found = []
    for words in commands():
        if words[0] == "s2dm":
            found.append(words[1:])
        elif "s2dm.cli" in words:
            found.append(words[words.index("s2dm.cli") + 1 :])
    # Not those that only name a command, such as "s2dm convert".
    return [words for words in found if any(word.startswith("-") for word in words)]


@pytest.mark.parametrize("words", of_s2dm(), ids=lambda words: " ".join(words)[:60])
def test_a_command_of_s2dm_parses_and_its_settings_exist(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = cli._parser()
    unfinished = any("…" in word for word in words)
    words = [word for word in words if word != "…"]
    if words[0] == "evaluate" and "-o" not in words:
        words = [*words, "-o", "runs/new"]  # a sentence leaves out what it doesn't speak of
    options = parser.parse_args(words)
    if options.command != "train" or unfinished:
        return
    configs: list[Any] = []
    for name, module in TRAINERS.items():
        monkeypatch.setattr(f"s2dm.training.{module}.{name}", configs.append)
    monkeypatch.chdir(ROOT)
    options.run(options)  # reads the file, and refuses settings that aren't there
    assert len(configs) == 1


def test_there_are_commands_of_every_kind() -> None:
    kinds = {words[0] for words in of_s2dm()}
    assert kinds >= {"train", "evaluate", "convert", "reproduce"}
    assert len(of_s2dm()) > 20


def test_scripts_that_pages_run_exist_and_know_their_options() -> None:
    own = [ROOT / "s2dm" / "cli" / f"{name}.py" for name in ("evaluate", "options")]
    evaluation = "".join(path.read_text("utf-8") for path in own)
    scripts = [w for w in commands() if w[0] == "python" and w[1].startswith(("bench", "tools"))]
    assert len(scripts) > 15
    for words in scripts:
        text = (ROOT / words[1]).read_text("utf-8")
        if "cli" in text:  # it takes the options of `s2dm evaluate`
            text += evaluation
        for word in words[2:]:
            if word.startswith("-"):  # some scripts make theirs of names
                assert f'"{word}"' in text or f'"{word[2:]}"' in text, words
