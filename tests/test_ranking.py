"""Recall, median rank and precision at k, against numbers worked out by hand and against other implementations."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from processing import ranking
from processing.ranking import precision_at_k, retrieval_recall

NAN = np.nan


def random_scores(shape: tuple[int, int], num_values: int | None = None) -> np.ndarray:
    """Distinct float32 scores, or few different values, so that most are tied."""
    rng = np.random.default_rng(0)
    if num_values is None:
        return rng.permutation(shape[0] * shape[1]).reshape(shape).astype(np.float32)
    return rng.integers(num_values, size=shape).astype(np.float32)


def sorted_against_us(scores: list[float], right: list[int]) -> list[int]:
    """Candidates in their order, written out: better ones first, of equal ones the wrong ones first."""

    def key(candidate: int):
        is_right, score = candidate in right, scores[candidate]
        if np.isnan(score):
            score = -np.inf if is_right else np.inf
        return -score, is_right

    return sorted(range(len(scores)), key=key)


def first_right_rank(scores: list[float], right: list[int]) -> int:
    order = sorted_against_us(scores, right)
    return min(order.index(candidate) for candidate in right) + 1


# Recall


def test_recall_by_hand_with_several_captions_of_an_image():
    scores = np.array(
        [
            [0.9, 0.1, 0.3],  # captions of image 0: first,
            [0.2, 0.8, 0.5],  # third,
            [0.6, 0.7, 0.1],  # of image 1: first,
            [0.8, 0.4, 0.5],  # third
        ]
    )
    results = retrieval_recall(scores, [[0], [0], [1], [1]], ks=[1, 2, 3])
    # Image 0: its best caption has 0.9, which is first. Image 1: 0.7 for its caption is behind 0.8 for another's.
    assert results == {
        "image_recall_at_1": 0.5,
        "image_recall_at_2": 0.5,
        "image_recall_at_3": 1.0,
        "image_median_rank": 2.0,
        "text_recall_at_1": 0.5,
        "text_recall_at_2": 1.0,
        "text_recall_at_3": 1.0,
        "text_median_rank": 1.5,
    }


def test_several_right_images_of_a_caption():
    # Of the right ones, the better one is second. The other one is in nobody's way.
    results = retrieval_recall(np.array([[5.0, 4.0, 3.0, 2.0]]), [[1, 2]], ks=(1, 2))
    assert (results["image_recall_at_1"], results["image_recall_at_2"], results["image_median_rank"]) == (0, 1, 2)
    # Images 0 and 3 have no captions: nothing is to be found for them. The others have but one candidate.
    assert (results["text_recall_at_1"], results["text_median_rank"]) == (1, 1)


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ([1.0, 1.0, 1.0], 3),
        ([1.0, 1.0, 0.0], 2),
        ([NAN, 0.0, 1.0], 3),  # as the lowest for the right one,
        ([1.0, NAN, 0.0], 2),  # as the highest for a wrong one
        ([NAN, NAN, NAN], 3),
        ([NAN, -np.inf, 0.0], 3),
        ([np.inf, np.inf, 0.0], 2),
        ([-np.inf, 0.0, -np.inf], 3),
    ],
)
def test_ties_and_nan_never_count_in_our_favour(scores, rank):
    assert retrieval_recall(np.array([scores]), [[0]])["image_median_rank"] == rank


def test_a_right_candidate_that_is_no_number_leaves_the_other_one():
    assert retrieval_recall(np.array([[NAN, 2.0, 1.0]]), [[0, 1]])["image_median_rank"] == 1


def test_recall_agrees_with_scikit_learn_and_scipy():
    image_of_caption = np.arange(60) // 3
    scores = random_scores((60, 20))
    results = retrieval_recall(scores, image_of_caption[:, None])
    for k in (1, 5, 10):
        expected = sklearn.metrics.top_k_accuracy_score(image_of_caption, scores, k=k)
        assert results[f"image_recall_at_{k}"] == pytest.approx(expected)
    # With one caption an image, where a rank is the last one of those that share a score.
    scores = random_scores((40, 40), num_values=7)
    results = retrieval_recall(scores, np.arange(40)[:, None])
    for direction, matrix in (("image", scores), ("text", scores.T)):
        ranks = np.diagonal(scipy.stats.rankdata(-matrix, method="max", axis=1))
        assert results[f"{direction}_median_rank"] == np.median(ranks)
        for k in (1, 5, 10):
            assert results[f"{direction}_recall_at_{k}"] == pytest.approx((ranks <= k).mean())


@pytest.mark.parametrize("num_values", [None, 5])
def test_recall_agrees_with_sorting_in_blocks_of_any_size(num_values, monkeypatch):
    rng = np.random.default_rng(1)
    scores = random_scores((30, 12), num_values)
    scores[rng.random(scores.shape) < 0.1] = NAN
    right = [rng.choice(12, size=rng.integers(1, 4), replace=False).tolist() for _ in range(30)]
    captions_of = [[caption for caption in range(30) if image in right[caption]] for image in range(12)]
    ranks = [first_right_rank(row, own) for row, own in zip(scores.tolist(), right, strict=True)]
    text_ranks = [
        first_right_rank(row, own) for row, own in zip(scores.T.tolist(), captions_of, strict=True) if len(own)
    ]
    for block_size in (1, 50, 1000):
        monkeypatch.setattr(ranking, "BLOCK_SIZE", block_size)
        results = retrieval_recall(scores, right)
        assert (results["image_median_rank"], results["text_median_rank"]) == (np.median(ranks), np.median(text_ranks))
        for k in (1, 5, 10):
            assert results[f"image_recall_at_{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
            assert results[f"text_recall_at_{k}"] == pytest.approx(np.mean(np.array(text_ranks) <= k))


def test_the_precision_of_scores_is_kept():
    close = np.array([[1.0, 1.0 + 1e-12]])
    assert retrieval_recall(close, [[1]])["image_median_rank"] == 1
    assert retrieval_recall(close.astype(np.float32), [[1]])["image_median_rank"] == 2
    assert retrieval_recall(np.array([[3, 2], [1, 2]]), [[0], [1]])["image_recall_at_1"] == 1


# Precision


def test_precision_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    results = precision_at_k(scores, [[0, 2, 5], [5]], ks=[1, 2, 3, 5])
    # Relevant among the first 1, 2, 3, 5: 1, 1, 2, 2 and 1, 1, 1, 1.
    expected = {1: 1.0, 2: 0.5, 3: (2 / 3 + 1 / 3) / 2, 5: (2 / 5 + 1 / 5) / 2}
    assert results == pytest.approx({f"precision_at_{k}": value for k, value in expected.items()})
    assert precision_at_k(scores, [[0, 2, 5], [5]]) == pytest.approx({"precision_at_5": 0.3})
    # No relevant ones; fewer candidates than k.
    assert precision_at_k(scores, [[], []]) == {"precision_at_5": 0.0}
    assert precision_at_k(scores[:, :2], [[0, 1], [0]]) == pytest.approx({"precision_at_5": (2 / 5 + 1 / 5) / 2})


@pytest.mark.parametrize(
    ("scores", "precision_at_2"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.0),
        ([1.0, 1.0, 1.0, 0.0], 0.5),
        ([NAN, 1.0, 0.0, 0.0], 0.5),
        ([1.0, 1.0, NAN, 0.0], 0.5),
        ([NAN, NAN, NAN, NAN], 0.0),
    ],
)
def test_precision_with_ties_and_nan(scores, precision_at_2):
    assert precision_at_k(np.array([scores]), [[0, 1]], ks=[2]) == {"precision_at_2": precision_at_2}


@pytest.mark.parametrize("num_values", [None, 5])
def test_precision_agrees_with_sorting_and_scikit_learn(num_values, monkeypatch):
    rng = np.random.default_rng(1)
    scores = random_scores((30, 12), num_values)
    relevant = [rng.choice(12, size=rng.integers(5), replace=False).tolist() for _ in range(30)]
    expected = {}
    for k in (1, 5):
        precisions = []
        for row, own in zip(scores.tolist(), relevant, strict=True):
            top = sorted_against_us(row, own)[:k]
            is_relevant, is_top = np.isin(np.arange(12), own), np.isin(np.arange(12), top)
            precisions.append(sklearn.metrics.precision_score(is_relevant, is_top))
        expected[f"precision_at_{k}"] = np.mean(precisions)
    for block_size in (1, 50, 1000):
        monkeypatch.setattr(ranking, "BLOCK_SIZE", block_size)
        assert precision_at_k(scores, relevant, ks=(1, 5)) == pytest.approx(expected)


# Faults


@pytest.mark.parametrize("metric", [retrieval_recall, precision_at_k])
@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (np.zeros(3), [[0]], r"shape \(queries, candidates\), .* got float64 of shape \(3,\)"),
        (np.zeros((0, 3)), [], r"at least one of each, got float64 of shape \(0, 3\)"),
        (np.zeros((2, 0)), [[], []], r"at least one of each, got float64 of shape \(2, 0\)"),
        (np.array([["a"]]), [[0]], r"must be numbers of .* got <U1 of"),
        (np.zeros((2, 3)), [[0]], r"right candidates of 2 queries, one for each row of scores, got 1"),
        (np.zeros((2, 3)), [0, 1], r"a list of right candidates for every query, got 0 for query 0"),
        (np.zeros((2, 3)), [[0], [3]], r"from 0 to 2, columns of the scores, got 3 for query 1"),
        (np.zeros((2, 3)), [[0], [-1]], r"from 0 to 2, .* got -1 for query 1"),
        (np.zeros((2, 3)), [[0.5], [1]], r"from 0 to 2, .* got 0.5 for query 0"),
        (np.zeros((2, 3)), [[None], [1]], r"from 0 to 2, .* got None for query 0"),
    ],
)
def test_faulty_input(metric, scores, right, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, right)


@pytest.mark.parametrize("metric", [retrieval_recall, precision_at_k])
@pytest.mark.parametrize("ks", [[], [0], [5, -1]])
def test_faulty_ks(metric, ks):
    with pytest.raises(ValueError, match="`ks` must be numbers of at least 1, got"):
        metric(np.zeros((1, 2)), [[0]], ks)


def test_recall_needs_a_right_candidate_of_every_query():
    with pytest.raises(ValueError, match=r"right candidate for every query, got none for 1: \[1\]"):
        retrieval_recall(np.zeros((2, 3)), [[0], []])
