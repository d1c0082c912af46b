"""A classifier of actions from flow alone, trained on true puppet flows.

It tells whether a generated flow shows the action that the prompt named. Every clip is one picture
with the channels of all its frames, which a few strided convolutions read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RUNS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from s2dm.data.puppets import ACTIONS, PuppetClips, split
from s2dm.files import replacing

SIZE = (32, 32)
TAKES, FIRST_TAKE = 2, 500  # takes that no training run of the generator renders
EPOCHS, BATCH = 30, 32


class _Conditions(Dataset):
    """(flow condition (N,3,32,32), action) of puppet clips."""

    def __init__(self, name: str, takes: int, first_take: int) -> None:
        self.clips = PuppetClips(name, takes=takes, first_take=first_take)
        self.pairs = split(name)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        action = self.pairs[index % len(self.pairs)][1]
        return self.clips[index].flow.condition(*SIZE), action


def true_flows(name: str, takes: int, first_take: int) -> tuple[Tensor, Tensor]:
    """Conditions (C,N,3,32,32) and actions (C,) of a split, rendered once and kept."""
    data = _Conditions(name, takes, first_take)
    path = RUNS / "action_classifier" / f"{name}-{takes}-{first_take}-{_puppets()}.pt"
    if not path.exists():
        loader = DataLoader(data, batch_size=None, num_workers=2, worker_init_fn=_one_thread)
        conditions, actions = zip(*loader, strict=True)
        with replacing(path) as temporary:
            torch.save((torch.stack(conditions).half(), torch.tensor(actions)), temporary)
    conditions, actions = torch.load(path, weights_only=True)
    return conditions.float(), actions


def _puppets() -> str:
    """Of how the puppets move, from one of them: other puppets are other clips."""
    flow = PuppetClips("train", takes=1)[0].flow.displacement.contiguous()
    return hashlib.sha256(flow.numpy().tobytes()).hexdigest()[:8]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class ActionClassifier(nn.Module):
    """Flow conditions (B,N,3,32,32) to logits (B,27)."""

    def __init__(self, frames: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3 * frames
        for after, stride in ((width, 1), (2 * width, 2), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
            before = after
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before * 16, len(ACTIONS))

    def forward(self, conditions: Tensor) -> Tensor:
        # A few pixels of motion are small numbers in half-frames.
        scaled = conditions * conditions.new_tensor([10.0, 10.0, 1.0]).view(3, 1, 1)
        features = self.body(scaled.flatten(1, 2))
        return self.head(F.dropout(features.flatten(1), 0.5, self.training))


def trained_classifier(seed: int = 0) -> ActionClassifier:
    """The classifier, trained once on the training split and kept."""
    path = RUNS / "action_classifier" / f"weights-{TAKES}-{EPOCHS}-{seed}-{_puppets()}.pt"
    conditions, actions = true_flows("train", TAKES, FIRST_TAKE)
    torch.manual_seed(seed)
    model = ActionClassifier(conditions.shape[1])
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    _train(model, conditions, actions)
    _save(model, path)
    return model.eval()


def _train(model: ActionClassifier, conditions: Tensor, actions: Tensor) -> None:
    steps = EPOCHS * (len(actions) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(actions) // BATCH) == 0:
            order = torch.randperm(len(actions))
        start = step % (len(actions) // BATCH) * BATCH
        chosen = order[start : start + BATCH]
        batch = _disturbed(conditions[chosen])
        loss = F.cross_entropy(model(batch), actions[chosen], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _disturbed(conditions: Tensor) -> Tensor:
    """Shifted by up to two cells, with a little noise: what moves counts, not just where."""
    shift = torch.randint(-2, 3, (2,)).tolist()
    conditions = torch.roll(conditions, shift, (-2, -1))
    return conditions + 0.01 * torch.randn_like(conditions)


def _save(model: ActionClassifier, path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)


@torch.no_grad()
def accuracy(model: ActionClassifier, conditions: Tensor, actions: Tensor) -> float:
    """Share of the clips whose action is recognised."""
    found = torch.cat([model(part).argmax(1) for part in conditions.split(64)])
    return (found == actions).float().mean().item()
