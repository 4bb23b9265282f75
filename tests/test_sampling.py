import numpy as np
import pytest

from processing import LengthGroupedSampler


def test_every_sample_once_in_another_order_each_epoch():
    sampler = LengthGroupedSampler(np.arange(1000) % 37, batch_size=8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(1000))
    assert list(LengthGroupedSampler(np.arange(1000) % 37, batch_size=8, seed=4)) != first


def test_batches_hold_similar_lengths_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 101, size=64 * 16)
    order = np.array(list(LengthGroupedSampler(lengths, batch_size=16)))
    batches = lengths[order].reshape(64, 16)
    # One window: 64 batches share 100 lengths, so a batch spans two or three of them.
    assert (batches.max(axis=1) - batches.min(axis=1)).max() <= 4
    means = batches.mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(64))[0, 1]) < 0.4  # neither from short to long nor back


def test_second_length_decides_where_the_first_is_equal():
    lengths = np.array([[1, 9], [2, 1], [1, 3], [2, 5]])
    order = list(LengthGroupedSampler(lengths, batch_size=2))
    assert sorted([order[:2], order[2:]]) == [[1, 3], [2, 0]]


def test_incomplete_batch_comes_last():
    order = list(LengthGroupedSampler(np.array([5, 1, 4, 2, 3]), batch_size=2))
    assert order[-1] == 0  # the longest of one window: all complete batches are before it
    assert sorted(order) == list(range(5))


def test_bad_batch_size():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LengthGroupedSampler(np.array([1]), batch_size=0)
