"""Models that stand in for RAFT."""

import torch


def shift_between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B,2): by how many whole pixels (x, y) the second of two pictures (B,3,h,w) is moved."""
    first, second = (images.double().mean(dim=1) for images in (first, second))
    first, second = (images - images.mean(dim=(1, 2), keepdim=True) for images in (first, second))
    height, width = first.shape[1:]
    spectra = torch.fft.fft2(first).conj() * torch.fft.fft2(second)
    peak = torch.fft.ifft2(spectra / spectra.abs().clamp(min=1e-9)).real.flatten(1).argmax(dim=1)
    x, y = peak % width, peak // width
    return torch.stack(
        [(x + width // 2) % width - width // 2, (y + height // 2) % height - height // 2], dim=1
    )


def everywhere(vectors: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The flow (B,2,h,w) of pictures that move as a whole by these vectors (B,2)."""
    return vectors.float().view(-1, 2, 1, 1).expand(-1, -1, *images.shape[2:])


class PanModel(torch.nn.Module):
    """Measures how the first pair moves, which is its trial; knows the motion of all others.

    asked: the pairs after the trial.
    """

    def __init__(self, x: float, y: float, as_list: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([x, y], dtype=torch.float64))
        self.as_list = as_list
        self.trials = 0
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, first: torch.Tensor, second: torch.Tensor):
        if self.trials == 0:
            self.trials += 1
            return everywhere(shift_between(first, second), first)
        self.asked.append((first, second))
        flow = everywhere(torch.stack([self.weight, -self.weight]), first)  # there, and back
        return [torch.zeros_like(flow), flow] if self.as_list else flow
