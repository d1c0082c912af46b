"""Where checkpoints lie: `models/s2dm`, and the ones that come with the pack."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths

logger = logging.getLogger(__name__)

FOLDER = "s2dm"
_BUNDLED = " (bundled)"
_ASSETS = Path(__file__).resolve().parents[2] / "s2dm" / "assets"


def register_folder() -> None:
    """Make `models/s2dm` known and, if it can be, there. Folders that the user has set stay.

    `output/s2dm` is listed too: core's save nodes write there, under a name like s2dm/NAME.
    """
    folder = Path(folder_paths.models_dir) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(folder))
    saved = Path(folder_paths.get_output_directory()) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(saved))
    # Without extensions of its own a folder lists every file.
    folders, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (folders, extensions or {".safetensors"})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("S2DM: the folder models/s2dm could not be made: %s", error)


def list_files() -> list[str]:
    """What the loaders offer: the bundled checkpoints first, then the user's.

    A folder that can't be read hides the user's: an error here would cost the pack its nodes.
    """
    try:
        bundled = sorted(path.name + _BUNDLED for path in _ASSETS.glob("*.safetensors"))
    except OSError as error:
        logger.warning("S2DM: the bundled checkpoints could not be listed: %s", error)
        bundled = []
    try:
        return bundled + folder_paths.get_filename_list(FOLDER)
    except OSError as error:
        logger.warning("S2DM: the checkpoints in models/%s could not be listed: %s", FOLDER, error)
        return bundled


def find_file(name: str) -> str:
    """The path of an entry of `list_files`.

    Raises:
        ValueError: there is no such file any more.
    """
    if name.endswith(_BUNDLED):
        path = _ASSETS / Path(name.removesuffix(_BUNDLED)).name
        found = str(path) if path.is_file() else None
    else:
        found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise ValueError(
            f"expected a file among {list_files()}, got '{name}'. Put it into the folder "
            f"{folder_paths.get_folder_paths(FOLDER)[0]} and refresh the page."
        )
    return found


def lora_path(name: str) -> Path:
    """Where a trained LoRA is kept, `models/loras/s2dm/NAME.safetensors`."""
    return Path(folder_paths.get_folder_paths("loras")[0]) / FOLDER / f"{name}.safetensors"


def trained_path(name: str, ours: bool) -> Path:
    """Where what was trained is kept, `models/s2dm/NAME.safetensors`.

    ours: whether a run of this name has written there before.

    Raises:
        ValueError: a file of this name is there that no run has written.
    """
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"
    if path.exists() and not ours:
        raise ValueError(
            f"expected a name that no file in {path.parent} has, got '{name}': {path.name} was not "
            "trained here and would be lost. Take another name."
        )
    return path
