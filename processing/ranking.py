"""How well scores rank candidates: recall and rank of the right ones, precision at k.

Scores that do not tell candidates apart never count in a model's favour: of equal scores the wrong candidate's comes
first, and a score that is not a number counts as the lowest for a right candidate and as the highest for a wrong one.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# Scores that are looked at at a time, in a handful of arrays of up to 8 bytes each.
BLOCK_SIZE = 1_000_000


def retrieval_recall(
    scores: np.ndarray, right_images: Sequence[Sequence[int]] | np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """
    Recall of both directions: of images by captions and of captions by images. Where a query has several right
    candidates, it is the one with the highest score that is to be found; the others are no wrong ones.

    Args:
        scores (`np.ndarray`):
            Numbers `(captions, images)`. They are not copied.
        right_images (sequence of sequences of `int`, or integers `(captions, n)`):
            Of each caption, the columns of the images that it is of, at least one. An image may have any number of
            captions.
        ks (sequence of `int`, *optional*, defaults to `(1, 5, 10)`):
            How many of the highest scores count.

    Returns:
        `dict[str, float]`: `image_recall_at_k`, the share of captions with a right image among the k images of the
        highest scores, for each k; `image_median_rank`, where the best right image has the rank 1 + the number of wrong
        images that are not below it; `text_recall_at_k` and `text_median_rank`, the same of captions for images. Images
        without captions are candidates, but no queries.

    Raises:
        ValueError: the scores are no matrix of numbers, or none; the right images are not as described.
    """
    scores = _checked_scores(scores)
    _check_ks(ks)
    captions, images = _right_pairs(right_images, scores.shape)
    without = np.setdiff1d(np.arange(len(scores)), captions)
    if len(without):
        raise ValueError(f"Expected a right candidate for every query, got none for {len(without)}: {without[:5]}.")
    results = {}
    for direction, ranks in (
        ("image", _best_right_ranks(scores, captions, images)),
        ("text", _best_right_ranks(scores.T, images, captions)),
    ):
        results |= {f"{direction}_recall_at_{k}": float((ranks <= k).mean()) for k in ks}
        results[f"{direction}_median_rank"] = float(np.median(ranks))
    return results


def precision_at_k(
    scores: np.ndarray, relevant: Sequence[Sequence[int]] | np.ndarray, ks: Sequence[int] = (5,)
) -> dict[str, float]:
    """
    Precision at k: the number of relevant candidates among the k of the highest scores, divided by k, also where there
    are fewer than k candidates; its mean over the queries.

    Args:
        scores (`np.ndarray`):
            Numbers `(queries, candidates)`. They are not copied.
        relevant (sequence of sequences of `int`, or integers `(queries, n)`):
            Of each query, the columns of the relevant candidates; there may be none.
        ks (sequence of `int`, *optional*, defaults to `(5,)`):
            How many of the highest scores count.

    Returns:
        `dict[str, float]`: `precision_at_k` for each k.

    Raises:
        ValueError: the scores are no matrix of numbers, or none; the relevant candidates are not as described.
    """
    scores = _checked_scores(scores)
    _check_ks(ks)
    queries, candidates = _right_pairs(relevant, scores.shape)
    counts = dict.fromkeys(ks, 0)
    for block, is_relevant in _blocks(scores, queries, candidates):
        keys = np.where(np.isnan(block), np.where(is_relevant, -np.inf, np.inf), block)
        # By the last key first: falling scores, and the relevant ones behind the others of the same score.
        order = np.lexsort((is_relevant, -keys), axis=-1)[:, : max(ks)]
        is_hit = np.take_along_axis(is_relevant, order, axis=1)
        for k in counts:
            counts[k] += int(is_hit[:, :k].sum())
    return {f"precision_at_{k}": count / (k * len(scores)) for k, count in counts.items()}


def _best_right_ranks(scores: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Ranks of the best right candidates, from 1, int64, of all rows that have a right candidate."""
    ranks = []
    for block, is_right in _blocks(scores, queries, candidates):
        block, is_right = block[is_right.any(axis=1)], is_right[is_right.any(axis=1)]
        best = np.where(is_right & ~np.isnan(block), block, -np.inf).max(axis=1, keepdims=True)
        # "Not less" rather than "greater or equal", for the sake of NaN.
        ranks.append(1 + (~(block < best) & ~is_right).sum(axis=1))
    return np.concatenate(ranks)


def _blocks(scores: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows of the scores at a time, and which of their candidates are right, bool of the same shape."""
    order = np.argsort(queries, kind="stable")
    queries, candidates = queries[order], candidates[order]
    num_rows = max(1, BLOCK_SIZE // scores.shape[1])
    for start in range(0, len(scores), num_rows):
        block = scores[start : start + num_rows]
        pairs = slice(*np.searchsorted(queries, [start, start + len(block)]))
        is_right = np.zeros(block.shape, dtype=bool)
        is_right[queries[pairs] - start, candidates[pairs]] = True
        yield block, is_right


def _checked_scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.size == 0 or not np.issubdtype(scores.dtype, np.number):
        raise ValueError(
            f"`scores` must be numbers of shape (queries, candidates), at least one of each, got {scores.dtype} of "
            f"shape {scores.shape}."
        )
    return scores


def _check_ks(ks: Sequence[int]) -> None:
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"`ks` must be numbers of at least 1, got {ks}.")


def _right_pairs(right: Sequence[Sequence[int]] | np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a query and a right candidate of it: the queries and the candidates, int64 `(pairs,)` each."""
    num_queries, num_candidates = shape
    if len(right) != num_queries:
        raise ValueError(
            f"Expected the right candidates of {num_queries} queries, one for each row of scores, got {len(right)}."
        )
    pairs = []
    for query, own in enumerate(right):
        if not isinstance(own, Sequence | np.ndarray) or isinstance(own, str):
            raise ValueError(f"Expected a list of right candidates for every query, got {own!r} for query {query}.")
        for candidate in own:
            if not isinstance(candidate, int | np.integer) or not 0 <= candidate < num_candidates:
                raise ValueError(
                    f"Expected right candidates from 0 to {num_candidates - 1}, columns of the scores, got "
                    f"{candidate!r} for query {query}."
                )
            pairs.append((query, candidate))
    queries, candidates = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return queries, candidates
