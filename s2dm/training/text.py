"""Train the text encoder of a new model, so that its states tell every word of the prompt.

A small model can't start from CLIP, and denoising alone teaches its text encoder only what the
picture can't do without: given the flow, hardly anything depends on the action's name, until frame
1 (whose flow is zero) and stage 1 (which makes the flow) need it. So the text encoder learns first,
from the captions alone: a linear layer has to read the whole prompt off a single state, the one at
the end of the text or any one of the padding behind it. Both stages then leave it as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import S2DMConfig
from ..models.tokenizer import train_tokenizer, with_tokenizer
from ..pipelines.modules import build_text_encoder, build_tokenizer, tokenize
from ..settings import SettingsError
from .cache import training_clips
from .config import TrainingConfig
from .loop import Progress, run_training
from .models import load_model, preset, save_model
from .run_folder import measured_once

logger = logging.getLogger(__name__)

_EMPTY_WEIGHT = 0.05  # of places where the prompt has no word any more


@dataclass(frozen=True, kw_only=True)
class TextTrainingConfig(TrainingConfig):
    """Settings of the text encoder's trainer.

    From random weights in the sizes of `preset`, with a tokenizer trained on the captions, or
    from the text encoder of `checkpoint`. `keep_weight` then holds its states near what they
    were, for the networks that read them already. A batch is `batch_size` captions. The layer
    that reads them names the first `from_start` tokens and the last `from_end`: places from
    the end bring the words of different captions together that stand behind texts of different
    length.
    """

    output: str = "runs/text"
    preset: str = "puppets"
    checkpoint: str = ""
    keep_weight: float = 0.0
    batch_size: int = 32
    from_start: int = 20
    from_end: int = 8
    steps: int = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_weight < 0 or (self.keep_weight > 0 and not self.checkpoint):
            raise SettingsError(
                "keep_weight must be at least 0, and above 0 it needs a checkpoint whose states "
                f"to keep, got {self.keep_weight} and checkpoint {self.checkpoint!r}."
            )


class TextModel(nn.Module):
    """The text encoder and the linear layer that reads its states, as the loop wants them."""

    def __init__(self, encoder: nn.Module, width: int, vocabulary: int, places: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.reader = nn.Linear(width, places * vocabulary)
        self.vocabulary = vocabulary

    def read(self, states: Tensor) -> Tensor:
        """States (..., width) to logits (..., places, vocabulary)."""
        return self.reader(states).unflatten(-1, (-1, self.vocabulary))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of `TextTask.batch`."""
        states = self.encoder(batch["token_ids"]).last_hidden_state
        rows = torch.arange(len(states), device=states.device)[:, None]
        logits = self.read(states[rows, batch["positions"]]).float()
        words, weights = batch["words"], batch["weights"]
        words = words[:, None].expand(logits.shape[:-1])
        error = F.cross_entropy(logits.flatten(0, -2), words.flatten(), reduction="none")
        error = error.view_as(words)
        weights = weights[:, None].expand_as(error)
        reading = (error * weights).sum() / weights.sum()
        losses = {"loss": reading, "loss_reading": reading.detach()}
        if batch.get("kept") is not None:
            drift = F.mse_loss(states.float(), batch["kept"])
            losses["loss"] = reading + batch["keep_weight"] * drift
            losses["drift"] = drift.detach().sqrt()
        return losses


class TextTask:
    """What the loop needs to train a text encoder."""

    def __init__(
        self,
        config: TextTrainingConfig,
        model_config: S2DMConfig,
        model: TextModel,
        captions: list[str],
        validation: list[str],
        states: dict[str, dict[str, Tensor]],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.model = model
        self.states = states
        tokenizer = build_tokenizer(model_config)
        self.token_ids = tokenize(tokenizer, captions)
        self.held_out = tokenize(tokenizer, validation)
        self.end = model_config.text_encoder.eos_token_id
        self.kept = None
        if config.keep_weight > 0:
            with torch.no_grad():
                parts = [model.encoder(ids).last_hidden_state for ids in self.token_ids.split(64)]
            self.kept = torch.cat(parts)

    def compile(self) -> None:
        self.model.encoder.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        count = min(self.config.batch_size, len(self.token_ids))
        chosen = torch.randint(len(self.token_ids), (count,), generator=generator)
        token_ids = self.token_ids[chosen]
        words, ends = self._words(token_ids)
        length = token_ids.shape[1]
        share = torch.rand(count, generator=generator)
        padding = (ends + (share * (length - ends)).long()).clamp(max=length - 1)
        there = (words != self.end).float()
        values = {
            "token_ids": token_ids,
            "positions": torch.stack([ends, padding], dim=1),
            "words": words,
            "weights": there + _EMPTY_WEIGHT * (1 - there),
        }
        if self.kept is not None:
            values["kept"] = self.kept[chosen]
            values["keep_weight"] = torch.tensor(self.config.keep_weight)
        return {key: value.to(device) for key, value in values.items()}

    def _words(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What stands at each place (B, places), and where the text ends (B,)."""
        ends = (token_ids == self.end).int().argmax(dim=1)
        first = token_ids[:, 1 : 1 + self.config.from_start]
        back = ends[:, None] - 1 - torch.arange(self.config.from_end)
        last = token_ids.gather(1, back.clamp(min=0))
        return torch.cat([first, last], dim=1), ends

    def sample(self, model: TextModel, path: Path) -> dict[str, float]:
        """Share of the words of held-out captions that are read right, at the end of the text."""
        device = next(model.parameters()).device
        words, ends = self._words(self.held_out)
        states = model.encoder(self.held_out.to(device)).last_hidden_state
        rows = torch.arange(len(ends), device=device)
        found = model.read(states[rows, ends.to(device)]).argmax(-1).cpu()
        there = words != self.end
        return {"read": float((found == words)[there].float().mean())}

    def export(self, model: TextModel, path: Path) -> None:
        """Write text encoder and tokenizer, in the checkpoint that the run started from if any."""
        save_model(path, self.model_config, {"text_encoder": model.encoder}, self.states)


def build_text_task(config: TextTrainingConfig) -> TextTask:
    """Prepare captions and model for `config`."""
    captions = _captions(config, config.data.split)
    held_out = _captions(config, config.data.validation_split)
    states: dict[str, Any] = {}
    if config.checkpoint:
        start = load_model(config.checkpoint)
        model_config, states = start.config, start.states
        if model_config.text_encoder is None:
            raise SettingsError(
                f"{config.checkpoint} has no text encoder to go on from: leave checkpoint empty "
                "to train a new one."
            )
        _say_who_reads(config, states)
    else:
        start = preset(config.preset)
        model_config = S2DMConfig(text_encoder=start.text_encoder)
        spec = measured_once(
            config, "tokenizer", lambda: train_tokenizer(captions, start.text_encoder.vocab_size)
        )
        model_config = with_tokenizer(model_config, spec)
    torch.manual_seed(config.seed)
    size = model_config.text_encoder
    encoder = build_text_encoder(size, states.get("text_encoder"))
    places = config.from_start + config.from_end
    model = TextModel(encoder, size.hidden_size, size.vocab_size, places)
    return TextTask(config, model_config, model, captions, held_out, states)


def _say_who_reads(config: TextTrainingConfig, states: Mapping[str, Any]) -> None:
    readers = {"unet": "stage 2", "flow_generator": "stage 1"}
    found = [stage for part, stage in readers.items() if part in states]
    if found:
        logger.warning(
            "%s: %s learned to read the prompt with the text encoder as it was. Train on with the "
            "export: %s.",
            config.checkpoint,
            " and ".join(found),
            ", then ".join(found),
        )


def _captions(config: TextTrainingConfig, split: str) -> list[str]:
    """The captions of a split, each once. The clips are cached with them: both stages use these."""
    return sorted(set(training_clips(config, split).captions))


def train_text(config: TextTrainingConfig) -> Progress:
    """Train a text encoder as `config` says, or go on with the run in its folder."""
    return run_training(config, lambda device: build_text_task(config))
