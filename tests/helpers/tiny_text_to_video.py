"""A short call of the pipeline of both stages, on a tiny model with random weights."""

from __future__ import annotations

from s2dm.models import FlowSampling
from s2dm.pipelines import TextToVideoPipeline

PROMPT = "A man wearing a red coat and blue jeans is squat"


def short(**sampling) -> dict:
    """Arguments of a call that takes little time, with these entries of its sampling."""
    # Without guidance, latents of random weights stay as large as those of a trained model.
    sampling = {"steps": 3, "guidance_scale": 1.0, **sampling}
    return dict(sampling=sampling, flow_sampling=FlowSampling(3), seed=1, output_type="latent")


SHORT = short()
STAGE_2 = {name: value for name, value in SHORT.items() if name != "flow_sampling"}


def load(path) -> TextToVideoPipeline:
    pipeline = TextToVideoPipeline.from_single_file(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
