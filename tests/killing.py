"""Trainings that die on the way, and what they must leave as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import TrainingRun


class Killed(BaseException):
    """Nothing that a script would catch."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Trainings in this process die before this step is counted, or checkpointed, and must get so far."""
    after_step = TrainingRun.after_step

    def after_step_or_death(self):
        if self.step == step:
            raise Killed
        after_step(self)

    with pytest.MonkeyPatch.context() as context, pytest.raises(Killed):
        context.setattr(TrainingRun, "after_step", after_step_or_death)
        yield


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, expected: Path):
    one, other = weights(folder), weights(expected)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
