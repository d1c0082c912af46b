"""In which numbers a training computes."""

from __future__ import annotations

import torch

MIXED_PRECISION = ("auto", "no", "bf16", "fp16")


def precision_on(device: torch.device, mixed_precision: str) -> str:
    """ "no", "bf16" or "fp16", as accelerate names them.

    Args:
        device: where the training runs.
        mixed_precision: one of `MIXED_PRECISION`. "auto" is bf16 where the device has
            instructions for it, else "no": without them PyTorch computes in bfloat16 too, but a
            convolution takes many times as long as in float32.
    """
    if mixed_precision != "auto":
        return mixed_precision
    if device.type == "cuda":
        # Not `is_bf16_supported`: it counts older cards that imitate it.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "no"
    # Older versions of PyTorch don't tell what a processor can do.
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "no"
    return "no"
