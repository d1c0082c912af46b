"""Evaluate a checkpoint: generate the clips of a data set's test split, measure them, compare.

Every clip is stored with its figures when it is done, so a stopped run goes on where it was. Under
`accelerate launch` each process takes its part of the clips, and the main one puts the results
together; on several machines they need a common output folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ClipDataset, DataConfig, build_dataset
from ..files import replacing
from ..flow import FlowField, estimate_flow
from ..models import FlowSampling, read_config
from .clip_metrics import (
    Total,
    attribute_accuracy,
    flicker,
    flow_error,
    motion_magnitude,
    moving_region,
    still_region,
    warp_error,
)
from .i3d import LEAST_FRAMES, load_i3d
from .modes import TRUE, ClipSampler, Made, Variant
from .protocol import code_version, file_hash
from .report import write_report
from .store import Task, as_bytes, as_frames, read_frames, store


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate, and how.

    checkpoint: a `.safetensors` file.
    output: folder of stored clips and results.
    data: whose `validation_split` is evaluated.
    clips: how many of its clips, in a shuffled order that never changes; 0 for all.
    variants: modes with their noise sharing, the rows of the table.
    seeds: each clip is generated once with each; clip k starts from noise 100000·seed + k.
    videos: 0, or how many to generate of the clips together, as papers do: each time a clip is
        drawn, with repetition, whose caption and flow are the conditions, and its r-th video has
        seed r. FVD and KVD compare all of them at once with the true clips.
    sampling: of stage 2, entries of `SamplingConfig` in place of what the checkpoint recommends.
    flow_sampling: of stage 1.
    method: flow estimator of the figures; None leaves out those that need one, and the time that
        it takes, which may be as long as sampling.
    i3d: weights for FVD and KVD (`load_i3d`), which are left out without them.
    chunk_size: frames computed at a time.
    half: weights in half precision: float16, on a CPU bfloat16.
    sheet_clips: clips on the sheet of pictures.
    cpu: don't use an accelerator.
    """

    checkpoint: Path
    output: Path
    data: DataConfig = field(default_factory=DataConfig)
    clips: int = 0
    variants: tuple[Variant, ...] = (Variant("given-flow"),)
    seeds: tuple[int, ...] = (0,)
    videos: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    flow_sampling: FlowSampling = FlowSampling()  # noqa: RUF009 (frozen)
    method: str | None = "dis"
    i3d: Path | None = None
    chunk_size: int = 8
    half: bool = False
    sheet_clips: int = 4
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"Expected one or more different {name}, got "
                    f"{', '.join(map(str, values)) or 'none'}."
                )
        if self.videos and self.seeds != (0,):
            raise ValueError(
                f"Expected videos or seeds, got videos={self.videos} and seeds "
                f"{', '.join(map(str, self.seeds))}: with videos, a clip has as many seeds as it "
                "is drawn."
            )
        if self.videos < 0 or self.videos == 1:
            raise ValueError(f"Expected 2 videos or more, or 0, got {self.videos}.")
        if self.i3d is not None and self.data.frames < LEAST_FRAMES:
            raise ValueError(
                f"FVD and KVD need clips of at least {LEAST_FRAMES} frames, got "
                f"{self.data.frames}: evaluate longer clips, or leave out the weights of I3D."
            )


def evaluate(config: EvaluationConfig) -> dict[str, Any] | None:
    """Run an evaluation, or go on with one.

    Writes `results.json`, `results.md`, `plots.png` and `sheet.jpg` into the output folder.

    Returns:
        What is in `results.json`: `protocol`, `table`, `notes` and, by row, in which folder of
        the output its `clips` lie. None in other processes than the main one.

    Raises:
        ValueError: settings, checkpoint, data set or weights that don't fit together, or frames
            that are not finite.
        OSError: a file can't be read or written.
    """
    from accelerate.utils import gather_object

    state = _processes(config.cpu)
    run = Run(config, state)
    run.generate()
    run.extract_features()
    # Wait for all. A barrier would do it on a GPU, with --cpu too, and on one there may not be.
    gather_object([None])
    return write_report(run) if state.is_main_process else None


def _processes(cpu: bool) -> Any:
    """The processes that share the clips, an accelerate.PartialState."""
    from accelerate import PartialState

    # They exchange a word at the start and at the end: on the CPU, so that several may work on
    # one GPU. And they wait for the slowest, which may take long.
    launched = {"backend": "gloo"} if "LOCAL_RANK" in os.environ else {}
    return PartialState(cpu=cpu, timeout=timedelta(days=7), **launched)


def shuffled(count: int) -> list[int]:
    """Numbers of the clips of a data set in the order in which they are evaluated."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order


def draw_conditions(clips: Sequence[int], videos: int) -> dict[int, int]:
    """How often each clip gives the conditions of a video: drawn with repetition, always alike."""
    chance = random.Random(0)
    drawn = Counter(clips[int(chance.random() * len(clips))] for _ in range(videos))
    return {clip: drawn[clip] for clip in clips}


class Run:
    """The clips of an evaluation, and this process's part in making and measuring them."""

    def __init__(self, config: EvaluationConfig, state: Any) -> None:
        from accelerate.utils import broadcast_object_list

        stages = read_config(config.checkpoint)
        # The numbers that are really used: clips are stored by them, and the protocol has them.
        self.sampling = stages.sampling.replacing(config.sampling)
        self.config, self.state = config, state
        self.weights = file_hash(config.checkpoint)
        self.data = build_dataset(config.data, config.data.validation_split)
        if config.data.estimated_flow:
            raise ValueError(
                "estimated_flow is a setting of trainings alone: an evaluation gives the flow of "
                "the data set. Leave it out."
            )
        if not 0 <= config.clips <= len(self.data):
            raise ValueError(
                f"Expected from 1 to {len(self.data)} clips, which the data set has, or 0 for all, "
                f"got {config.clips}. More takes or seeds make more clips."
            )
        self.chosen = shuffled(len(self.data))[: config.clips or None]
        self.drawn = draw_conditions(self.chosen, config.videos) if config.videos else None
        if config.i3d is not None and len(self.chosen) < 2:
            raise ValueError("FVD and KVD need at least 2 clips, got 1.")
        needing = [variant.mode for variant in config.variants if variant.stage_1]
        if stages.flow_generator is None and needing:
            raise ValueError(
                f"{config.checkpoint.name} has no flow generator (stage 1), which {needing[0]} "
                "needs: leave that mode out, or take a checkpoint of both stages."
            )
        # Before hours of sampling, not after.
        self.i3d = None if config.i3d is None else load_i3d(config.i3d, state.device)
        half = torch.bfloat16 if state.device.type == "cpu" else torch.float16
        dtype = half if config.half else torch.float32
        self.sampler = ClipSampler(
            config.checkpoint,
            self.sampling,
            config.flow_sampling,
            config.chunk_size,
            state.device,
            dtype,
        )
        self.code = code_version()
        # Of the main process, because other machines may differ in a last digit.
        (self.data_hash,) = broadcast_object_list([_fingerprint(self.data)])

    # ------------------------------------------------------------------------------- clips

    def tasks(self, variant: Variant, indices: list[int] | None = None) -> list[Task]:
        indices = self.chosen if indices is None else indices
        return [
            Task(variant, index, seed) for index in indices for seed in self._seeds(variant, index)
        ]

    def _seeds(self, variant: Variant, index: int) -> Sequence[int]:
        if not variant.sampled:
            return self.config.seeds[:1]
        return self.config.seeds if self.drawn is None else range(self.drawn[index])

    @cache  # noqa: B019 (a run lives as long as its process)
    def folder(self, variant: Variant) -> str:
        """Where the clips of a row lie in the output: elsewhere with anything that changes them."""
        config = self.config
        made_by = [self.data_hash, dataclasses.asdict(config.data), config.method, str(variant)]
        if variant != TRUE:  # the truth is every checkpoint's
            made_by += [self.weights, str(self.sampler.dtype)]
        if variant.sampled:
            made_by += [self.sampling.to_dict(), dataclasses.asdict(config.flow_sampling)]
        if variant.recipe:
            made_by.append(variant.recipe)
        key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:8]
        return f"clips/{str(variant).replace(':', '_')}-{key}"

    def path(self, task: Task) -> Path:
        return self.config.output / self.folder(task.variant) / task.file_name

    def generate(self) -> None:
        """Make, measure and store what is missing of this process's part."""
        variants = list(self.config.variants)
        if self.i3d is not None and TRUE not in variants:
            variants.append(TRUE)  # what FVD compares with
        _one_thread_of_opencv()
        mine = self._mine(variants)
        with self._bar("clips", len(mine)) as bar:
            for index, tasks in itertools.groupby(mine, lambda task: task.index):
                clip = None  # rendered or read once for all its rows
                for task in tasks:
                    path = self.path(task)
                    if not path.exists():
                        clip = self.data[index] if clip is None else clip
                        made = task.variant.make(self.sampler, clip, task.noise_seed)
                        self._check_finite(made, task)
                        store(path, *self._measured(made, clip), self.code)
                    bar.update()

    def _check_finite(self, made: Made, task: Task) -> None:
        if not torch.isfinite(made.frames).all():
            remedy = "evaluate without --half" if self.config.half else "look at the checkpoint"
            raise ValueError(
                f"Expected finite frames of row {task.variant}, clip {task.index}, seed "
                f"{task.seed}, got NaN or infinite values: {remedy}."
            )

    def _measured(self, made: Made, clip: Any) -> tuple[np.ndarray, dict[str, Total]]:
        """Frames as bytes (N,H,W,3), and the figures of these bytes."""
        stored = as_bytes(made.frames)
        frames = as_frames(stored)
        method, still = self.config.method, made.still
        realised = None if method is None else estimate_flow(frames, method)
        if still is None and realised is not None:
            still = still_region(realised)
        totals = {}
        if made.flow is not None:
            if realised is not None:
                totals |= _following(realised, made.flow)
            totals["warp_error"] = warp_error(frames, made.flow)
        if still is not None:
            totals["flicker"] = flicker(frames, still)
        totals["attributes"] = attribute_accuracy(frames[0], clip.garments)
        return stored, totals

    # ---------------------------------------------------------------------------- features

    def features_path(self, task: Task) -> Path:
        network = f"{self.i3d.description} {self.i3d.preprocessing}"
        key = hashlib.sha256(network.encode()).hexdigest()[:8]
        return self.path(task).with_suffix(f".{key}.npy")

    def extract_features(self) -> None:
        """The features that are missing of this process's part."""
        if self.i3d is None:
            return
        tasks = self._mine([*dict.fromkeys((*self.config.variants, TRUE))])
        with self._bar("features", len(tasks)) as bar:
            for task in tasks:
                path = self.features_path(task)
                if not path.exists():
                    features = self.i3d(read_frames(self.path(task))[None])[0]
                    with replacing(path) as temporary:
                        np.save(temporary, features.numpy())
                bar.update()

    def features(self) -> dict[str, list[Tensor]]:
        """Of each row and of the true clips, (videos,400) of each clip; nothing without weights."""
        if self.i3d is None:
            return {}
        return {
            str(variant): [self._stored_features(variant, index) for index in self.chosen]
            for variant in dict.fromkeys((*self.config.variants, TRUE))
        }

    def _stored_features(self, variant: Variant, index: int) -> Tensor:
        stored = [np.load(self.features_path(task)) for task in self.tasks(variant, [index])]
        return torch.from_numpy(np.stack(stored)) if stored else torch.zeros(0)

    # ------------------------------------------------------------------------------ sharing

    def _mine(self, variants: list[Variant]) -> list[Task]:
        """This process's part of the work: the same at every start, whatever is done already.

        A stretch of it, so that a clip is read by few processes, and each has as much to do.
        """
        tasks = [task for index in self.chosen for v in variants for task in self.tasks(v, [index])]
        part, parts = self.state.process_index, self.state.num_processes
        return tasks[part * len(tasks) // parts : (part + 1) * len(tasks) // parts]

    def _bar(self, title: str, total: int) -> Any:
        from tqdm.auto import tqdm

        hidden = not self.state.is_local_main_process
        return tqdm(total=total, desc=title, unit="clip", disable=hidden)


def _following(realised: FlowField, given: FlowField) -> dict[str, Total]:
    """How a clip follows the flow that it was given."""
    region = moving_region(given)
    error, motion = flow_error(realised, given), motion_magnitude(given, region)
    return {
        "flow_error": error,
        "flow_error_pixels": Total(error.total, motion.weight),
        "motion": motion_magnitude(realised, region),
        "given_motion": motion,
    }


def _fingerprint(data: ClipDataset) -> str:
    """Of what the clips hold: the same settings may name other clips some day.

    Where the data set doesn't know of itself when they change, of its first clip alone.
    """
    clip = data[0]
    digest = hashlib.sha256(clip.caption.encode())
    digest.update(getattr(data, "fingerprint", "").encode())
    digest.update(as_bytes(clip.pixels))
    digest.update(clip.flow.displacement.cpu().float().contiguous().numpy())
    return digest.hexdigest()


def _one_thread_of_opencv() -> None:
    """OpenCV's own threads slow it down many times where other processes are busy."""
    import cv2

    cv2.setNumThreads(1)
