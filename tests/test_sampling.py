import itertools
from collections import Counter

import numpy as np
import pytest

from processing import ShuffledBatchSampler
from processing.sampling import shuffle_by_length


def rng(seed=0):
    return np.random.default_rng(seed)


def test_batches_hold_similar_lengths_in_random_order():
    lengths = rng(1).integers(1, 101, size=64 * 16)
    order = shuffle_by_length(lengths, 16, rng())
    batches = lengths[order].reshape(64, 16)
    # One window: 64 batches share 100 lengths, so a batch spans two or three of them.
    assert (batches.max(axis=1) - batches.min(axis=1)).max() <= 4
    means = batches.mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(64))[0, 1]) < 0.4  # neither from short to long nor back


def test_second_length_decides_where_the_first_is_equal():
    lengths = np.array([[1, 9], [2, 1], [1, 3], [2, 5]])
    order = shuffle_by_length(lengths, 2, rng()).tolist()
    assert sorted([order[:2], order[2:]]) == [[1, 3], [2, 0]]


def test_incomplete_batch_comes_last():
    order = shuffle_by_length(np.array([5, 1, 4, 2, 3]), 2, rng()).tolist()
    assert order[-1] == 0  # the longest of one window: all complete batches are before it
    assert sorted(order) == list(range(5))


@pytest.mark.parametrize("lengths", [None, np.arange(1000) % 37])
def test_every_sample_once_in_another_order_each_epoch(lengths):
    sampler = ShuffledBatchSampler(1000, 8, lengths, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_position(1)
    second = list(sampler)
    assert first == again != second
    assert len(first) == len(sampler) == 125
    for batches in (first, second):
        assert sorted(itertools.chain(*batches)) == list(range(1000))
    assert list(ShuffledBatchSampler(1000, 8, lengths, seed=4)) != first


@pytest.mark.parametrize("first_batch", [0, 1, 57, 124, 125])
def test_an_epoch_goes_on_at_any_batch(first_batch):
    sampler = ShuffledBatchSampler(1000, 8, np.arange(1000) % 7)
    sampler.set_position(2)
    whole = list(sampler)
    sampler.set_position(2, first_batch)
    assert list(sampler) == whole[first_batch:]


@pytest.mark.parametrize("num_samples", [1, 30, 96, 100])
@pytest.mark.parametrize("num_processes, batches_per_step", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_processes_share_an_epoch_in_whole_steps(num_samples, num_processes, batches_per_step):
    """Every sample once, and those of the first batches again where steps would lack some."""
    samplers = [
        ShuffledBatchSampler(
            num_samples,
            4,
            process_index=process,
            num_processes=num_processes,
            batches_per_step=batches_per_step,
        )
        for process in range(num_processes)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    assert len(samplers[0]) % batches_per_step == 0
    number_of_batches = -(-num_samples // 4)
    in_order = [batch for same_number in zip(*batches, strict=True) for batch in same_number]
    assert len(in_order) - number_of_batches < num_processes * batches_per_step
    assert in_order[:number_of_batches] == list(ShuffledBatchSampler(num_samples, 4))
    assert Counter(itertools.chain(*in_order[:number_of_batches])) == Counter(range(num_samples))
    cycle = itertools.cycle(in_order[:number_of_batches])
    assert in_order == [next(cycle) for _ in in_order]


def test_accumulating_process_takes_the_steps_of_several():
    two = [ShuffledBatchSampler(50, 4, process_index=process, num_processes=2) for process in range(2)]
    one = ShuffledBatchSampler(50, 4, batches_per_step=2)
    for sampler in (*two, one):
        sampler.set_position(5)
    steps = list(zip(*two, strict=True))
    batches = list(one)
    assert steps == list(zip(batches[::2], batches[1::2], strict=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batches_per_step": 0}, "`batches_per_step` must be at least 1, got 0"),
        ({"process_index": 2, "num_processes": 2}, "from 0 to 1, got 2"),
        ({"lengths": np.ones(3)}, "of 10 samples, got 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShuffledBatchSampler(**{"num_samples": 10, "batch_size": 2} | arguments)
