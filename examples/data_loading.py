"""What the training loop reads: the batches of one epoch after the other, from any of them on."""

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from processing import ShuffledBatchSampler, StreamedBatches


def outlive_sigterm(worker: int):
    """
    To be called in a worker. SIGTERM for all processes is for the training process, which needs its batches until it
    has written a checkpoint; a worker ends when its parent asks for it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_when_the_parent_asks():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_when_the_parent_asks, daemon=True).start()


def check_held_out(train_ids: Iterable[Any], validation_ids: Iterable[Any], what: str):
    """
    Raises:
        ValueError: something is evaluated on that was trained on.
    """
    shared = sorted(set(train_ids) & set(validation_ids))
    if shared:
        raise ValueError(
            f"Evaluation needs {what} that are not trained on, got {len(shared):,} that are: {shared[:5]}. Choose "
            "other splits."
        )


@dataclass
class Batch:
    """
    What the training loop takes: the inputs of the model, and which samples they are of.

    Args:
        collator: Makes the inputs.
        identify: From a sample to what a report names it by, as JSON has it.
    """

    collator: Callable[[list], dict[str, torch.Tensor]]
    identify: Callable[[Any], Any]

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        return {"inputs": self.collator(samples), "ids": [self.identify(sample) for sample in samples]}


class EpochLoader(ABC):
    """
    An iteration gives what is left of the epoch, in the order of this process. [`begin_epoch`] goes to the next one.

    Attributes:
        epoch: The epoch that the next batch is of, from 0.
        batch: Number of its batches that have been given.
    """

    def __init__(self):
        self.epoch = self.batch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches of this process in a whole epoch."""

    @abstractmethod
    def _open(self) -> Iterator[Any]:
        """The batches from the position on."""

    def __iter__(self) -> Iterator[Any]:
        if self.batch < len(self):
            for batch in self._open():
                self.batch += 1
                yield batch
                if self.batch == len(self):
                    break

    def begin_epoch(self, epoch: int):
        """Goes to the beginning of an epoch."""
        self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Goes on there."""
        self.epoch, self.batch = state_dict["epoch"], state_dict["batch"]


class DatasetLoader(EpochLoader):
    """
    Batches of a dataset whose samples are read by number.

    Args:
        dataset: If it has a method `set_epoch`, this is called before every epoch.
        batch_sampler: Which samples, in which order.
        collate_fn: From the samples of a batch to the batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: ShuffledBatchSampler,
        collate_fn: Callable[[list], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__()
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        self.loader = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            worker_init_fn=outlive_sigterm,
            pin_memory=pin_memory,
            # Beginning to read would draw from the generator of the dropout otherwise.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def _open(self) -> Iterator[Any]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        self.batch_sampler.set_position(self.epoch, self.batch)
        return iter(self.loader)


class StreamLoader(EpochLoader):
    """
    Batches of a stream, which has no end. An epoch is a number of them.

    Args:
        batches: The stream, with the share of this process.
        batches_per_epoch: Of this process.
        collate_fn: From the samples of a batch to the batch.

    Raises:
        ImportError: torchdata is missing.
    """

    def __init__(
        self,
        batches: StreamedBatches,
        batches_per_epoch: int,
        collate_fn: Callable[[list], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__()
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader
        except ImportError as error:
            raise ImportError("Streaming needs torchdata: pip install 'interbert[streaming]'.") from error
        if batches_per_epoch < 1:
            raise ValueError(f"`batches_per_epoch` must be at least 1, got {batches_per_epoch}.")
        self.batches_per_epoch = batches_per_epoch
        self.loader = StatefulDataLoader(
            batches,
            batch_size=None,
            collate_fn=collate_fn,
            num_workers=num_workers,
            worker_init_fn=outlive_sigterm,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )
        self._position: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.batches_per_epoch

    def _open(self) -> Iterator[Any]:
        # Workers are started anew, since what they make of a window may be different in another epoch.
        if self._position is not None:
            self.loader.load_state_dict(self._position)
        for batch in self.loader:
            self._position = self.loader.state_dict()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"stream": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]):
        super().load_state_dict(state_dict)
        self._position = state_dict["stream"]
