"""What travels from the data to the network."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Carry one batch; data and model share this type and nothing else."""

    inputs: Tensor
    """What enters the network at layer `entry`; (N, 3, H, W) images if `entry` is 0, uint8 on the way."""
    labels: Tensor
    """Class numbers, int64, (N,)."""
    indices: Tensor
    """Which images of the source's split these are, int64, (N,)."""
    entry: int = 0
    """Number of the network layer that comes next: above 0 where `inputs` are features computed before."""
    other_labels: Tensor | None = None
    """Where images are mixed: class numbers of those pasted over these, int64, (N,)."""
    other_shares: Tensor | None = None
    """The part of each image that is pasted over, float32, (N,)."""
