"""What the pipelines share of checking their arguments."""

from __future__ import annotations

OUTPUT_TYPES = ("pt", "pil", "latent")
"""The forms that a clip comes in: a tensor, PIL images, latents."""


def check_arguments(
    prompt: str, output_type: str, chunk_size: int, num_inference_steps: int
) -> None:
    """Check the arguments that every pipeline takes.

    Raises:
        ValueError: one of them is out of its range, or not what it should be.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"Expected one prompt as text, got {type(prompt).__name__}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, not {output_type!r}.")
    if chunk_size < 1 or num_inference_steps < 1:
        raise ValueError(
            "Expected chunk_size and num_inference_steps of at least 1, got "
            f"{chunk_size} and {num_inference_steps}."
        )
