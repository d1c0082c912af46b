"""The experiments of the paper on one of its data sets, as a chain of steps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert import convert
from ..data import DataConfig, build_dataset
from ..data.recordings import TABLES, RecordedClips
from ..evaluation.modes import Variant
from ..evaluation.protocol import file_hash
from ..evaluation.run import EvaluationConfig, evaluate
from ..files import replacing, write_json, write_text
from ..models import FLOW_SAMPLERS, FlowSampling
from ..settings import SettingsError, from_dict, read_values, to_dict
from ..training.cache import build_clip_cache
from ..training.config import TrainingConfig
from ..training.loop import Progress
from ..training.stage1 import Stage1TrainingConfig, train_stage1
from ..training.stage2 import Stage2TrainingConfig, train_stage2
from ..training.vae import VAETrainingConfig, train_vae
from .chain import Chain, Interrupted, Step
from .tables import paper_tables

if TYPE_CHECKING:
    from .plan import Plan

_CONFIGS = Path(__file__).parents[1] / "training" / "configs"
_PRESETS = Path(__file__).parent / "presets"
DATA_SETS = ("mhad", "mug")
PRESETS = tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))

_GIVEN = "given-flow-plain"
_INDEPENDENT = "given-flow-plain:independent"
_TWO_STAGE = "two-stage-plain"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiments are: a file of `presets`, each table over a trainer's preset."""

    data: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    stage2: dict[str, Any] = field(default_factory=dict)
    stage1: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Size:
        path = _PRESETS / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(PRESETS)
            raise SettingsError(f"unknown preset {name!r}; known presets: {known}.")
        return from_dict(cls, read_values(path))


class Experiment:
    """The paper on one data set.

    Args:
        data: "mhad" or "mug".
        folder: of the data set's files, as published.
        start: Stable Diffusion 1.5, a folder or a file; or a checkpoint of ours to start from.
        output: folder of all that is made.
        size: how large.
        i3d: weights of I3D.
        lfdm: LFDM's weights, `flowdiff_*.pth` and `RegionMM_*.pth`, and a folder with BERT, which
            make the flow in a row of table 1; none for no such row.
        seed: of the split.
        workers: processes that prepare clips; -1 for what the presets say.
        half: evaluate in half precision.
        cpu: evaluate without an accelerator.

    Raises:
        SettingsError: settings that don't fit, or that a step in the folder was begun without.
        ValueError, OSError: the data can't be found or read.
    """

    def __init__(
        self,
        data: str,
        folder: Path,
        start: Path,
        output: Path,
        size: Size,
        i3d: Path,
        lfdm: Sequence[Path] = (),
        seed: int = 0,
        workers: int = -1,
        half: bool = False,
        cpu: bool = False,
    ) -> None:
        if data not in DATA_SETS:
            raise SettingsError(f"expected one of {', '.join(DATA_SETS)}, got {data!r}.")
        for path in (folder, start, i3d, *lfdm):
            if not path.exists():
                raise SettingsError(f"there is nothing at {path}.")
        self.name, self.start, self.output, self.lfdm = data, start, output, lfdm
        self.size, self.i3d, self.half, self.cpu = size, i3d, half, cpu
        self.workers = workers
        self.words = output / "words.toml"
        options = {"folder": str(folder), "table": str(self.words), "seed": seed}
        given = size.data.get("options", {})
        self.data = from_dict(
            DataConfig, {**size.data, "name": data, "options": {**given, **options}}
        )
        self._copy_words()
        self.vae = self._config(
            VAETrainingConfig, "vae", "paper_vae", size.vae, checkpoint=self.sd15
        )
        self.stage2 = self._stage2("shared")
        self.stage2_independent = self._stage2("independent")
        self.stage1 = self._config(
            Stage1TrainingConfig, "stage1", None, size.stage1, checkpoint=_export(self.stage2)
        )
        self.chain = Chain(output, self._steps())

    @property
    def sd15(self) -> Path:
        return self.output / "start.safetensors"

    @property
    def with_lfdm(self) -> Path:
        return self.output / "lfdm.safetensors"

    def plan(self) -> Plan:
        """What is to be done, and about what it takes here."""
        from .plan import make_plan

        return make_plan(self)

    # --------------------------------------------------------------------------------- settings

    def _copy_words(self) -> None:
        """The table of persons and actions lies in the output folder, to be edited ahead of all."""
        if not self.words.exists():
            with replacing(self.words) as temporary:
                shutil.copyfile(TABLES / f"{self.name}.toml", temporary)

    def _config(
        self, kind: type[Any], run: str, base: str | None, over: Mapping[str, Any], **files: Path
    ) -> Any:
        """Settings of the trainer `kind` for the folder `run`: those of `base`, then `over`."""
        values = read_values(_CONFIGS / f"{base}.toml") if base else {}
        fixed = {
            "output": str(self.output / run),
            "cache": str(self.output / "cache"),
            "data": to_dict(self.data),
            **{name: str(path) for name, path in files.items()},
        }
        if self.workers >= 0:
            fixed["workers"] = self.workers
        return from_dict(kind, {**values, **over, **fixed})

    def _stage2(self, noise: str) -> Stage2TrainingConfig:
        run = "stage2" if noise == "shared" else f"stage2_{noise}"
        config = self._config(
            Stage2TrainingConfig,
            run,
            "paper",
            self.size.stage2,
            checkpoint=self.sd15,
            vae=_export(self.vae),
        )
        return dataclasses.replace(config, noise_sharing=noise)

    @property
    def evaluations(self) -> tuple[str, ...]:
        """Trainings by their noise, "lfdm" for the shared one with LFDM's weights as stage 1."""
        return ("shared", "independent", *(["lfdm"] if self.lfdm else []))

    def evaluation(self, name: str) -> EvaluationConfig:
        """One of `evaluations`."""
        values = self.size.evaluation
        checkpoint, modes, sampler = {
            "shared": (_export(self.stage1), (_GIVEN, _INDEPENDENT, _TWO_STAGE), FLOW_SAMPLERS[0]),
            "independent": (_export(self.stage2_independent), (_INDEPENDENT,), FLOW_SAMPLERS[0]),
            "lfdm": (self.with_lfdm, (_TWO_STAGE,), "lfdm"),
        }[name]
        return EvaluationConfig(
            checkpoint=checkpoint,
            output=self.output / "evaluation" / name,
            data=dataclasses.replace(self.data, takes=1),
            variants=tuple(map(Variant.parse, modes)),
            videos=values["videos"],
            sampling=values["sampling"],
            flow_sampling=FlowSampling(values["flow_steps"], sampler=sampler),
            method=None,
            i3d=self.i3d,
            half=self.half,
            cpu=self.cpu,
        )

    # ------------------------------------------------------------------------------------ steps

    def _steps(self) -> list[Step]:
        words = self.words.read_text("utf-8")
        steps = [
            Step(
                "split",
                "hold out combinations of person and action",
                self._split,
                {"data": to_dict(self.data), "words": words},
            ),
            Step(
                "start",
                f"make a checkpoint of {self.start.name}, with a flow adapter",
                partial(convert, self.start, self.sd15),
                {"from": str(self.start)},
            ),
        ]
        steps += [
            Step("clips", "read the clips and estimate their flow", self._clips, {}, ("split",)),
            self._training("vae", "fine-tune the autoencoder", self.vae, train_vae, "start"),
            self._training("stage2", "train stage 2", self.stage2, train_stage2, "vae"),
            self._training(
                "stage2_independent",
                "train stage 2 without shared noise (table 2)",
                self.stage2_independent,
                train_stage2,
                "vae",
            ),
            self._training("stage1", "train stage 1", self.stage1, train_stage1, "stage2"),
        ]
        needs = {"shared": "stage1", "independent": "stage2_independent", "lfdm": "lfdm"}
        if self.lfdm:
            join = partial(convert, _export(self.stage2), self.with_lfdm, beside=self.lfdm)
            files = {"from": [str(path) for path in self.lfdm]}
            steps.append(
                Step("lfdm", "put LFDM's weights beside stage 2", join, files, ("stage2",))
            )
        steps += [self._evaluation(name, (needs[name],)) for name in self.evaluations]
        done = tuple(f"evaluate_{name}" for name in self.evaluations)
        steps.append(Step("tables", "write the tables", self._tables, {}, done))
        return steps

    def _training(
        self,
        name: str,
        title: str,
        config: TrainingConfig,
        train: Callable[[Any], Progress],
        needs: str,
    ) -> Step:
        def run() -> None:
            progress = train(config)
            if progress.fraction(config) < 1:
                raise Interrupted(f"{title}: stopped at step {progress.step}")

        return Step(name, title, run, _deciding(config), ("clips", needs))

    def _evaluation(self, name: str, needs: tuple[str, ...]) -> Step:
        config = self.evaluation(name)
        whose = "LFDM's flow" if name == "lfdm" else f"{name} noise"
        title = f"generate and measure {config.videos} videos in each row ({whose})"
        settings = {
            "rows": [str(variant) for variant in config.variants],
            "videos": config.videos,
            "sampling": dict(config.sampling),
            "flow_steps": config.flow_sampling.steps,
            "i3d": file_hash(config.i3d),
            "half": config.half,
        }

        def run() -> None:
            evaluate(config)

        return Step(f"evaluate_{name}", title, run, settings, needs)

    def _split(self) -> None:
        train, test = (build_dataset(self.data, name) for name in ("train", "test"))
        assert isinstance(train, RecordedClips) and isinstance(test, RecordedClips)
        write_json(
            self.output / "split.json",
            {
                "seed": self.data.options["seed"],
                "held_out": sorted(map(list, test.held_out)),
                "train": [one.path.name for one in train.recordings],
                "test": [one.path.name for one in test.recordings],
            },
        )

    def _clips(self) -> None:
        build_clip_cache(self.output / "cache", self.data, "train", self.stage2.workers)

    def _tables(self) -> None:
        results = {}
        for name in self.evaluations:
            path = self.evaluation(name).output / "results.json"
            results[name] = json.loads(path.read_text("utf-8"))["table"]
        write_json(self.output / "tables.json", {"data": self.name, "results": results})
        write_text(self.output / "tables.md", paper_tables(self.name, results) + "\n")


def _export(config: TrainingConfig) -> Path:
    return Path(config.output) / "export.safetensors"


# What a run may be gone on with otherwise: it changes nothing that is made.
_FREE = ("threads", "workers", "compile", "log_every", "sample_every_minutes", "save_every_minutes")


def _deciding(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide about the weights of a training."""
    return {name: value for name, value in to_dict(config).items() if name not in _FREE}
