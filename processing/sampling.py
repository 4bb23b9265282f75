"""Orders in which samples are read."""

from collections.abc import Iterator

import numpy as np
import torch

# Samples are sorted by length within windows of so many batches: long enough for batches of nearly equal lengths, short
# enough for another composition of the batches in every epoch.
BATCHES_PER_WINDOW = 64


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """
    Shuffles samples such that those of a batch have similar lengths, and little of the batch is padding.

    Samples are shuffled, sorted by length within windows of 64 batches, and the batches of a window are shuffled. The
    order depends on `seed` and the epoch alone, and is the same in every process.

    Args:
        lengths (`np.ndarray`):
            Integers of shape `(samples,)`, or `(samples, modalities)` to sort by the first column and, where it is
            equal, by the next.
        batch_size (`int`):
            Batch size of each process.
        seed (`int`):
            Not negative.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.lengths = lengths.reshape(len(lengths), -1)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self))
        # The last, smaller batch stays last, or it would shift those behind it.
        window_size = BATCHES_PER_WINDOW * self.batch_size
        for start in range(0, len(shuffled), window_size):
            window = shuffled[start : start + window_size]
            # `lexsort` sorts by its last key first.
            window = window[np.lexsort(self.lengths[window].T[::-1])]
            num_batches = len(window) // self.batch_size
            batches = window[: num_batches * self.batch_size].reshape(num_batches, self.batch_size)
            yield from rng.permutation(batches).ravel().tolist()
            yield from window[num_batches * self.batch_size :].tolist()
