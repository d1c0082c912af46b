"""How far two results are apart."""

from torch import Tensor


def relative(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, as a part of the norm of `other`."""
    return float((one - other).norm() / other.norm())
