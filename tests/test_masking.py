import numpy as np
import pytest

from processing.masking import (
    MaskingVocabulary,
    mask_overlapping_regions,
    mask_regions_independently,
    mask_segments,
    mask_tokens,
    pairwise_iou,
)

MASK = 4
# Texts below use ids from 100 up, random words are 10 to 19: the two cannot be mistaken for one another.
VOCABULARY = MaskingVocabulary(mask_token_id=MASK, replacement_token_ids=np.arange(10, 20))


def make_text(length):
    return np.arange(100, 100 + length)


class FakeTokenizer:
    mask_token_id = 4
    all_special_ids = [0, 2, 3, 4]

    def get_vocab(self):
        return {"[PAD]": 0, "a": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "b": 6, "c": 5}


def test_vocabulary_of_a_tokenizer_has_no_special_tokens():
    vocabulary = MaskingVocabulary.from_tokenizer(FakeTokenizer())
    assert vocabulary.mask_token_id == 4
    assert vocabulary.replacement_token_ids.tolist() == [1, 5, 6]
    tokenizer = FakeTokenizer()
    tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        MaskingVocabulary.from_tokenizer(tokenizer)


@pytest.mark.parametrize("mask", [mask_tokens, mask_segments])
def test_labels_and_replacements(mask):
    input_ids = make_text(400_000)
    original = input_ids.copy()
    special = np.zeros(len(input_ids), dtype=bool)
    masked, labels = mask(input_ids, special, VOCABULARY, np.random.default_rng(0))
    np.testing.assert_array_equal(input_ids, original)
    selected = labels != -100
    np.testing.assert_array_equal(labels[selected], original[selected])
    np.testing.assert_array_equal(masked[~selected], original[~selected])
    now, before = masked[selected], original[selected]
    assert np.mean(now == MASK) == pytest.approx(0.8, abs=0.006)
    assert np.mean(now == before) == pytest.approx(0.1, abs=0.005)
    is_random_word = (now >= 10) & (now < 20)
    assert np.mean(is_random_word) == pytest.approx(0.1, abs=0.005)
    assert np.all((now == MASK) | (now == before) | is_random_word)
    counts = np.bincount(now[is_random_word] - 10, minlength=10)
    np.testing.assert_allclose(counts / counts.sum(), 0.1, atol=0.02)


def test_mask_tokens_selects_15_percent_of_the_ordinary_tokens():
    special = np.arange(200_000) % 4 == 0
    _, labels = mask_tokens(make_text(200_000), special, VOCABULARY, np.random.default_rng(1))
    selected = labels != -100
    assert not selected[special].any()
    assert selected[~special].mean() == pytest.approx(0.15, abs=0.004)
    # Independent: the share of selected tokens behind selected ones is the same.
    behind = selected[2::4][selected[1::4]]
    assert behind.mean() == pytest.approx(0.15, abs=0.02)


def test_no_token_is_masked_by_force():
    empty = 0
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        _, labels = mask_tokens(make_text(4), np.array([True, False, False, True]), VOCABULARY, rng)
        empty += (labels == -100).all()
    assert empty / 2000 == pytest.approx(0.85**2, abs=0.04)


def test_mask_segments_anchors_are_10_percent():
    # Between special tokens a segment cannot grow: what is masked are the anchors themselves.
    special = np.arange(200_000) % 2 == 0
    _, labels = mask_segments(make_text(200_000), special, VOCABULARY, np.random.default_rng(2))
    selected = labels != -100
    assert not selected[special].any()
    assert selected[~special].mean() == pytest.approx(0.10, abs=0.004)


def test_mask_segments_are_1_2_or_3_tokens_long_with_equal_shares():
    # With anchors this rare, hardly two segments touch.
    special = np.zeros(3_000_000, dtype=bool)
    _, labels = mask_segments(make_text(3_000_000), special, VOCABULARY, np.random.default_rng(3), probability=0.001)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels != -100, [0]])))
    lengths = edges[1::2] - edges[::2]
    shares = np.bincount(lengths, minlength=7)[1:] / len(lengths)
    np.testing.assert_allclose(shares[:3], 1 / 3, atol=0.03)
    assert shares[3:].sum() < 0.01


def test_mask_segments_share_of_masked_tokens():
    # A token stays if it is no anchor (0.9), the one before is none of length 2 or 3 (1 − 0.1 · 2/3), and the one
    # before that is none of length 3 (1 − 0.1 · 1/3): 0.9 · 0.9333 · 0.9667 = 0.812.
    special = np.zeros(400_000, dtype=bool)
    _, labels = mask_segments(make_text(400_000), special, VOCABULARY, np.random.default_rng(4))
    assert (labels != -100).mean() == pytest.approx(0.188, abs=0.004)


def test_mask_segments_end_before_special_tokens():
    # In "a [SEP] b c [PAD]" a segment that begins at a must not reach b: b is masked as an anchor only,
    # c also behind b.
    special = np.array([False, True, False, False, True])
    counts = np.zeros(5)
    for seed in range(20_000):
        _, labels = mask_segments(make_text(5), special, VOCABULARY, np.random.default_rng(seed))
        counts += labels != -100
    assert counts[1] == counts[4] == 0
    np.testing.assert_allclose(counts[[0, 2]] / 20_000, 0.1, atol=0.008)
    # c: 1 − 0.9 · (1 − 0.1 · 2/3) = 0.16
    assert counts[3] / 20_000 == pytest.approx(0.16, abs=0.01)


@pytest.mark.parametrize("mask", [mask_tokens, mask_segments])
def test_texts_of_one_or_two_tokens_can_be_masked(mask):
    for length in (1, 2):
        special = np.zeros(length, dtype=bool)
        _, labels = mask(make_text(length), special, VOCABULARY, np.random.default_rng(0), probability=1.0)
        np.testing.assert_array_equal(labels, make_text(length))


def test_wrong_arguments_of_text_masking():
    with pytest.raises(ValueError, match=r"got the shapes \(3,\) and \(2,\)"):
        mask_tokens(make_text(3), np.zeros(2, dtype=bool), VOCABULARY, np.random.default_rng(0))
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        mask_segments(make_text(3), np.zeros(3, dtype=bool), VOCABULARY, np.random.default_rng(0), probability=1.5)


def test_pairwise_iou_by_hand():
    boxes = np.array(
        [
            [0, 0, 2, 2],  # area 4
            [1, 1, 3, 3],  # area 4, shares 1 with the first: 1 / 7
            [0, 0, 4, 2],  # area 8, shares 4 with the first: 4 / 8; 2 with the second: 2 / 10
            [2, 0, 3, 2],  # area 2, touches the first; shares 1 with the second: 1 / 5; 2 with the third: 2 / 8
            [1, 1, 1, 1],  # no area
            [1, 0, 1, 2],  # no area
        ],
        dtype=np.float32,
    )
    expected = np.zeros((6, 6))
    expected[:4, :4] = [
        [1, 1 / 7, 1 / 2, 0],
        [1 / 7, 1, 1 / 5, 1 / 5],
        [1 / 2, 1 / 5, 1, 1 / 4],
        [0, 1 / 5, 1 / 4, 1],
    ]
    np.testing.assert_allclose(pairwise_iou(boxes), expected, atol=1e-12)
    np.testing.assert_allclose(pairwise_iou(boxes[1:3], boxes), expected[1:3], atol=1e-12)
    # Apart in both directions: two negative sides must not make an area.
    assert pairwise_iou(np.array([[0, 0, 1, 1], [5, 5, 6, 6]]))[0, 1] == 0
    with pytest.raises(ValueError, match=r"\(n, 4\), got \(2, 3\)"):
        pairwise_iou(np.zeros((2, 3)))


def test_mask_regions_independently_masks_15_percent():
    mask = mask_regions_independently(200_000, np.random.default_rng(5))
    assert mask.dtype == bool
    assert mask.shape == (200_000,)
    assert mask.mean() == pytest.approx(0.15, abs=0.004)


def iou_in_plain_python(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0


def test_mask_overlapping_regions_by_brute_force():
    followers = 0
    for seed in range(300):
        corners = np.random.default_rng(1000 + seed).integers(0, 12, size=(15, 2, 2))
        boxes = np.sort(corners, axis=1).reshape(15, 4).astype(np.float32)
        anchors = mask_regions_independently(15, np.random.default_rng(seed))
        mask = mask_overlapping_regions(boxes, np.random.default_rng(seed))
        for i in range(15):
            overlaps = any(iou_in_plain_python(boxes[i], boxes[j]) > 0.4 for j in np.flatnonzero(anchors))
            assert mask[i] == (anchors[i] or overlaps)
            followers += mask[i] and not anchors[i]
    assert followers > 50


def test_iou_of_exactly_the_threshold_does_not_follow():
    # The first two share 2 of 5: 0.4. The third shares 2 of 4 with the second.
    boxes = np.array([[0, 0, 5, 1], [0, 0, 2, 1], [0, 0, 4, 1]], dtype=np.float32)
    seen = set()
    for seed in range(200):
        anchors = mask_regions_independently(3, np.random.default_rng(seed))
        mask = mask_overlapping_regions(boxes, np.random.default_rng(seed))
        seen.add((tuple(anchors.tolist()), tuple(mask.tolist())))
    assert ((True, False, False), (True, False, True)) in seen  # 4 of 5 with the third
    assert ((False, True, False), (False, True, True)) in seen
    assert ((False, False, True), (True, True, True)) in seen


def test_boxes_without_area_are_masked_as_anchors_only():
    boxes = np.array([[1, 1, 1, 1]] * 2000, dtype=np.float32)
    mask = mask_overlapping_regions(boxes, np.random.default_rng(6))
    assert mask.mean() == pytest.approx(0.15, abs=0.03)
