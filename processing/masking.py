"""Masking of words and regions for pretraining. Every function draws from the generator it is given and from nothing
else, and treats one sample."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

IGNORED_LABEL = -100


@dataclass(frozen=True)
class MaskingVocabulary:
    """
    What the masking of words needs to know of a tokenizer.

    Args:
        mask_token_id (`int`): id of `[MASK]`.
        replacement_token_ids (`np.ndarray`): int64 `(k,)`, the ids from which a random word is drawn: all but the
            special ones.
        similar_words (mapping, *optional*): by the ids of a word, the ids of those that are like it, int64
            `(words, tokens)`. With it, masking is correction (MacBERT): a word becomes a similar one in place of
            `[MASK]`, or a random one where it has none.
    """

    mask_token_id: int
    replacement_token_ids: np.ndarray
    similar_words: Mapping[tuple[int, ...], np.ndarray] | None = None

    @classmethod
    def from_tokenizer(
        cls, tokenizer, similar_words: Mapping[tuple[int, ...], np.ndarray] | None = None
    ) -> "MaskingVocabulary":
        """Reads the ids from a tokenizer of `transformers`."""
        if tokenizer.mask_token_id is None:
            raise ValueError("Masking needs a tokenizer with a mask token, got one without.")
        token_ids = np.array(sorted(tokenizer.get_vocab().values()), dtype=np.int64)
        return cls(tokenizer.mask_token_id, np.setdiff1d(token_ids, tokenizer.all_special_ids), similar_words)


def _check_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"`probability` must be between 0 and 1, got {probability}.")


def _maskable(input_ids: np.ndarray, special_tokens_mask: np.ndarray) -> np.ndarray:
    if input_ids.ndim != 1 or special_tokens_mask.shape != input_ids.shape:
        raise ValueError(
            "`input_ids` and `special_tokens_mask` must be vectors of one length, got the shapes "
            f"{input_ids.shape} and {special_tokens_mask.shape}."
        )
    return ~special_tokens_mask.astype(bool, copy=False)


def _number_words(maskable: np.ndarray, word_starts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The word of each token, int64 `(tokens,)`, and which words may be masked, bool `(words,)`. Without
    `word_starts` every token is a word."""
    if word_starts is None:
        return np.arange(maskable.size), maskable
    if word_starts.shape != maskable.shape:
        raise ValueError(f"`word_starts` must have the shape {maskable.shape}, got {word_starts.shape}.")
    # Special tokens are words of their own.
    starts = word_starts.astype(bool) | ~maskable
    starts[1:] |= ~maskable[:-1]
    starts[:1] = True
    return np.cumsum(starts) - 1, maskable[starts]


def _replace(
    input_ids: np.ndarray,
    selected_words: np.ndarray,
    word_numbers: np.ndarray,
    vocabulary: MaskingVocabulary,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Masked ids and labels. Of the selected tokens 80 % become `[MASK]`, 10 % a random word, 10 % stay; with similar
    words that is decided for a word as a whole."""
    selected = selected_words[word_numbers]
    labels = np.where(selected, input_ids, IGNORED_LABEL)
    if vocabulary.similar_words is not None:
        return _replace_by_similar_words(input_ids, selected_words, word_numbers, vocabulary, rng), labels
    positions = np.flatnonzero(selected)
    original = input_ids[positions]
    # For a handful of tokens `random` takes a fifth of the time of `integers`.
    decision, choice = rng.random((2, positions.size))
    random_words = vocabulary.replacement_token_ids[(choice * vocabulary.replacement_token_ids.size).astype(np.int64)]
    masked_input_ids = input_ids.copy()
    masked_input_ids[positions] = np.where(
        decision < 0.8, vocabulary.mask_token_id, np.where(decision < 0.9, random_words, original)
    )
    return masked_input_ids, labels


def _replace_by_similar_words(
    input_ids: np.ndarray,
    selected_words: np.ndarray,
    word_numbers: np.ndarray,
    vocabulary: MaskingVocabulary,
    rng: np.random.Generator,
) -> np.ndarray:
    """Of the selected words 80 % become a similar one, or a random one where there is none, 10 % a random one, 10 %
    stay."""
    replaced_input_ids = input_ids.copy()
    for word in np.flatnonzero(selected_words):
        positions = np.flatnonzero(word_numbers == word)
        decision = rng.random()
        similar = vocabulary.similar_words.get(tuple(input_ids[positions].tolist()))
        if decision < 0.8 and similar is not None:
            replaced_input_ids[positions] = similar[rng.integers(len(similar))]
        elif decision < 0.9:
            replaced_input_ids[positions] = rng.choice(vocabulary.replacement_token_ids, positions.size)
    return replaced_input_ids


def mask_tokens(
    input_ids: np.ndarray,
    special_tokens_mask: np.ndarray,
    vocabulary: MaskingVocabulary,
    rng: np.random.Generator,
    probability: float = 0.15,
    word_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Masked language modeling (MLM): masks each token with the same probability, independently of the others.

    Args:
        input_ids (`np.ndarray`): int64 `(tokens,)`.
        special_tokens_mask (`np.ndarray`): bool `(tokens,)`, true for special tokens and padding, which are never
            masked.
        vocabulary (`MaskingVocabulary`): mask token and random words.
        rng (`np.random.Generator`): source of all draws.
        probability (`float`): share of the tokens that are masked. A short sample may end up with none.
        word_starts (`np.ndarray`, *optional*): bool `(tokens,)`, true for the first token of each word. Whole words are
            masked then (Chinese-BERT-wwm), each with that probability.

    Returns:
        `masked_input_ids` int64 `(tokens,)` and `labels` int64 `(tokens,)`: the original id where a token was selected,
        −100 elsewhere. Of the selected tokens 80 % became `[MASK]`, 10 % a random word, 10 % stayed as they were.
    """
    _check_probability(probability)
    maskable = _maskable(input_ids, special_tokens_mask)
    word_numbers, maskable_words = _number_words(maskable, word_starts)
    selected = maskable_words & (rng.random(maskable_words.size) < probability)
    return _replace(input_ids, selected, word_numbers, vocabulary, rng)


def mask_segments(
    input_ids: np.ndarray,
    special_tokens_mask: np.ndarray,
    vocabulary: MaskingVocabulary,
    rng: np.random.Generator,
    probability: float = 0.10,
    word_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Masked segment modeling (MSM): each token is an anchor with the same probability; 0, 1 or 2 following tokens
    (uniformly) are masked with it. Segments may meet and overlap; a segment ends before a special token.

    Args and returns as for [`mask_tokens`]; `probability` is that of an anchor. With `word_starts`, anchors and those
    that follow are whole words.
    """
    _check_probability(probability)
    word_numbers, maskable = _number_words(_maskable(input_ids, special_tokens_mask), word_starts)
    anchors = maskable & (rng.random(maskable.size) < probability)
    # Uniform in [0, 3): the whole part is the number of following words.
    following = 3 * rng.random(maskable.size)
    selected = anchors.copy()
    selected[1:] |= anchors[:-1] & (following[:-1] >= 1) & maskable[1:]
    selected[2:] |= anchors[:-2] & (following[:-2] >= 2) & maskable[1:-1] & maskable[2:]
    return _replace(input_ids, selected, word_numbers, vocabulary, rng)


def mask_regions_independently(num_regions: int, rng: np.random.Generator, probability: float = 0.15) -> np.ndarray:
    """
    Masked object modeling (MOM): masks each region with the same probability.

    Returns:
        bool `(num_regions,)`, true for the regions to mask.
    """
    _check_probability(probability)
    return rng.random(num_regions) < probability


def mask_overlapping_regions(
    boxes: np.ndarray, rng: np.random.Generator, probability: float = 0.15, iou_threshold: float = 0.4
) -> np.ndarray:
    """
    Masked region modeling (MRM): each region is an anchor with the same probability; it and every region that overlaps
    it with an intersection over union above the threshold are masked, so that a masked object cannot be read off a
    second box around it.

    Args:
        boxes (`np.ndarray`): float `(regions, 4)`, x1, y1, x2, y2 in any unit.
        rng (`np.random.Generator`): source of all draws.
        probability (`float`): that of an anchor.
        iou_threshold (`float`): strictly above it, a region goes with the anchor.

    Returns:
        bool `(regions,)`, true for the regions to mask.
    """
    anchors = mask_regions_independently(len(boxes), rng, probability)
    if not anchors.any():
        return anchors
    return anchors | (pairwise_iou(boxes[anchors], boxes) > iou_threshold).any(axis=0)


def pairwise_iou(boxes: np.ndarray, other_boxes: np.ndarray | None = None) -> np.ndarray:
    """
    Intersection over union of every box with every other.

    Args:
        boxes (`np.ndarray`): float `(n, 4)`, x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.
        other_boxes (`np.ndarray`, optional): float `(m, 4)`; `boxes` if left out.

    Returns:
        float64 `(n, m)`. A pair without area has 0, also a box without area with itself.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    other_boxes = boxes if other_boxes is None else np.asarray(other_boxes, dtype=np.float64)
    for given in (boxes, other_boxes):
        if given.ndim != 2 or given.shape[1] != 4:
            raise ValueError(f"Boxes must have the shape (n, 4), got {given.shape}.")
    left, top, right, bottom = boxes.T[:, :, None]  # each (n, 1)
    other_left, other_top, other_right, other_bottom = other_boxes.T  # each (m,)
    widths = np.minimum(right, other_right) - np.maximum(left, other_left)  # (n, m)
    heights = np.minimum(bottom, other_bottom) - np.maximum(top, other_top)
    intersections = np.maximum(widths, 0) * np.maximum(heights, 0)
    areas = (right - left) * (bottom - top)
    other_areas = (other_right - other_left) * (other_bottom - other_top)
    unions = areas + other_areas - intersections
    return np.divide(intersections, unions, out=np.zeros_like(unions), where=unions > 0)
