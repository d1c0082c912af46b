"""The project is nobody else's: every address in it exists, and no name in it is another's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# Each exists. Look an address up before you add it here.
KNOWN = (
    "http://127.0.0.1",
    "https://example.com",  # reserved for examples
    "https://git-lfs",  # how its pointers begin
    "http://www.apache.org/licenses/",
    "http://www.w3.org/",  # the name space of SVG
    "https://arxiv.org/abs/",
    "https://github.com/Comfy-Org/ComfyUI",
    "https://huggingface.co/docs/accelerate",
)
ADDRESS = re.compile(r"""(?:https?|git|ssh|ftp)://[^\s"'`<>)\]\\]+|git@[\w.]+:[^\s"'`]+""")
# The authors of the paper own this organisation; the project has no address of its own yet.
THEIRS = re.compile(r"(?:github|githubusercontent|gitlab|huggingface)\.com?[/:]s2dm", re.I)


def texts() -> dict[Path, str]:
    """What the project consists of, by path; pictures, clips and weights left out."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository: which files belong to the project is not known")
    found = {}
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if path.is_file() and path != Path(__file__) and b"\0" not in path.read_bytes():
            try:
                found[path] = path.read_text("utf-8")
            except UnicodeDecodeError:  # a test's input in another encoding
                continue
    return found


def test_every_address_exists():
    strange = [
        f"{path.relative_to(ROOT)}: {address}"
        for path, text in texts().items()
        for address in ADDRESS.findall(text)
        if not address.startswith(KNOWN)
    ]
    assert not strange, "addresses that nobody looked up: " + ", ".join(strange)


def test_nothing_names_the_authors_organisation_as_ours():
    claims = [str(path.relative_to(ROOT)) for path, text in texts().items() if THEIRS.search(text)]
    assert not claims
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["name"] != "s2dm"  # another project's on PyPI
    # Whoever publishes has to give theirs.
    assert not {"PublisherId", "Icon"} & project["tool"]["comfy"].keys()
    assert "urls" not in project["project"]


def test_the_readme_says_whose_work_this_is():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "independent implementation" in readme
    assert "not by the authors of the paper" in readme
