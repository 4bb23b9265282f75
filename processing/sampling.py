"""Orders in which samples are read."""

from collections.abc import Iterator

import numpy as np
import torch

# Samples are sorted by length within windows of so many batches: long enough for batches of nearly equal lengths, short
# enough for another composition of the batches in every epoch.
BATCHES_PER_WINDOW = 64


def shuffle_by_length(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """
    A random order in which those of a batch have similar lengths: samples are shuffled, sorted by length within windows
    of 64 batches, and the batches of a window are shuffled.

    Args:
        lengths (`np.ndarray`):
            Integers of shape `(samples,)`, or `(samples, modalities)` to sort by the first column and, where it is
            equal, by the next.
        batch_size (`int`): Number of samples of a batch.
        rng (`np.random.Generator`): Source of all draws.

    Returns:
        int64 `(samples,)`. The samples of a smaller batch come last.
    """
    lengths = lengths.reshape(len(lengths), -1)
    order = rng.permutation(len(lengths))
    # The last, smaller batch stays last, or it would shift those behind it.
    window_size = BATCHES_PER_WINDOW * batch_size
    for start in range(0, len(order), window_size):
        window = order[start : start + window_size]
        # `lexsort` sorts by its last key first.
        window[:] = window[np.lexsort(lengths[window].T[::-1])]
        batches = window[: len(window) // batch_size * batch_size].reshape(-1, batch_size)
        batches[:] = rng.permutation(batches)
    return order


class ShuffledBatchSampler(torch.utils.data.Sampler[list[int]]):
    """
    The batches of one process, for `DataLoader(..., batch_sampler=...)`: shuffled anew in every epoch, with samples of
    similar lengths where these are given, divided among the processes, and read from any batch on.

    In an epoch every sample comes once; so many of the first batches come again as are needed for all processes to have
    equally many, and a multiple of `batches_per_step`. The order depends on the seed and the epoch alone. Of its
    batches, process p of P has those with the numbers p, p + P, p + 2P …, so that one process that accumulates the
    gradients of P batches takes the same steps as P processes.

    Args:
        num_samples (`int`): At least 1.
        batch_size (`int`): Batch size of each process.
        lengths (`np.ndarray`, *optional*): Lengths of the samples, as [`shuffle_by_length`] takes them.
        seed (`int`, *optional*, defaults to 0): Not negative.
        process_index, num_processes (`int`): Which of so many processes this is.
        batches_per_step (`int`, *optional*, defaults to 1):
            Batches of each process that make a step of the optimizer. Every epoch consists of whole steps.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        lengths: np.ndarray | None = None,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        batches_per_step: int = 1,
    ):
        for name, value in (
            ("num_samples", num_samples),
            ("batch_size", batch_size),
            ("num_processes", num_processes),
            ("batches_per_step", batches_per_step),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be from 0 to {num_processes - 1}, got {process_index}.")
        if lengths is not None and len(lengths) != num_samples:
            raise ValueError(f"`lengths` must be those of {num_samples} samples, got {len(lengths)}.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.lengths = lengths
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.batches_per_step = batches_per_step
        self.set_position(0)

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration is that of this epoch, without this process's first batches."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Number of batches of this process in a whole epoch."""
        batches_of_all = self.num_processes * self.batches_per_step
        num_batches = -(-self.num_samples // self.batch_size)
        return -(-num_batches // batches_of_all) * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.lengths is None:
            order = rng.permutation(self.num_samples)
        else:
            order = shuffle_by_length(self.lengths, self.batch_size, rng)
        num_batches = -(-self.num_samples // self.batch_size)
        for batch in range(self.first_batch, len(self)):
            number = (batch * self.num_processes + self.process_index) % num_batches
            yield order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
