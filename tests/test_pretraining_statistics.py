"""Statistics of 100,000 samples, half of them of each stage of pretraining, against numbers worked out by hand.

All bounds are five standard deviations of what is counted: a right implementation fails once in 1.7 million seeds, and
the seed is fixed. Where events of one sample depend on one another, one of each sample is counted.
"""

from dataclasses import dataclass, fields

import datasets
import numpy as np
import pyarrow as pa
import pytest
from transformers import BertTokenizer

from processing import InterBERTProcessor, PretrainingCollator, PretrainingPairs, RegionDataset

NUM_IMAGES, CAPTIONS_PER_IMAGE = 1000, 5
NUM_PAIRS = NUM_IMAGES * CAPTIONS_PER_IMAGE
EPOCHS_PER_STAGE = 10
BATCH_SIZE = 250
MAX_TOKENS, NUM_REGIONS, FEATURE_SIZE = 20, 8, 2
HARD_SHARE, IN_BATCH_SHARE = 0.3, 0.25
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
# The word "hard" stands in hard negatives only.
WORDS = ["hard", *(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(199))]


def make_images():
    """Captions of 4 to 18 words, 60 texts for 5,000 captions: without a check, one in twelve negatives would match."""
    rng = np.random.default_rng(0)

    def draw_text(words):
        chosen = rng.choice(words, rng.integers(4, 19)).tolist()
        return " ".join([*chosen[:-1], "unknown"] if rng.random() < 0.2 else chosen)

    texts = [draw_text(WORDS[1:]) for _ in range(60)]
    captions = [[texts[i] for i in rng.choice(60, CAPTIONS_PER_IMAGE)] for _ in range(NUM_IMAGES)]
    hard_negatives = []
    for own_captions in captions:
        # Two of the four are captions of the image, but for case and white space.
        hard_negatives.append([own_captions[0].upper(), f"hard {texts[0]}", f" {own_captions[1]}", f"hard {texts[1]}"])
    corners = np.sort(rng.integers(0, 13, (NUM_IMAGES, NUM_REGIONS, 2, 2)), axis=2)
    boxes = corners.reshape(NUM_IMAGES, NUM_REGIONS, 4).astype(np.float32)
    return captions, hard_negatives, boxes


CAPTIONS, HARD_NEGATIVES, BOXES = make_images()


def make_dataset():
    rng = np.random.default_rng(1)
    features = rng.random((NUM_IMAGES, NUM_REGIONS, FEATURE_SIZE)).astype(np.float32) + 1
    table = pa.table(
        {
            "image_id": [str(i) for i in range(NUM_IMAGES)],
            "width": pa.array([12] * NUM_IMAGES, pa.int32()),
            "height": pa.array([12] * NUM_IMAGES, pa.int32()),
            "boxes": pa.array(BOXES.tolist(), pa.list_(pa.list_(pa.float32(), 4))),
            "features": pa.array(features.tolist(), pa.list_(pa.list_(pa.float32(), FEATURE_SIZE))),
            "class_ids": pa.array([[0] * NUM_REGIONS] * NUM_IMAGES, pa.list_(pa.int32())),
            "captions": pa.array(CAPTIONS, pa.list_(pa.string())),
            "hard_negatives": pa.array(HARD_NEGATIVES, pa.list_(pa.string())),
        }
    )
    return RegionDataset(datasets.Dataset(table))


class RecordingCollator(PretrainingCollator):
    """Keeps what it tokenizes: captions with the negatives in place, and their tokens before they are masked."""

    def tokenize(self, captions):
        batch = super().tokenize(captions)
        self.captions, self.original_ids = captions, batch["input_ids"].copy()
        return batch


def collect(objectives, epochs, tokenizer):
    """
    All samples of some epochs, one after the other: arrays `(samples,)`, those of tokens `(samples, 20)`, those of
    regions `(samples, 8)`.
    """
    pairs = PretrainingPairs(make_dataset(), objectives=objectives, seed=5)
    pairs.set_negative_shares(HARD_SHARE, IN_BATCH_SHARE)
    collator = RecordingCollator(InterBERTProcessor(tokenizer, region_feature_size=FEATURE_SIZE), objectives)
    num_samples = len(epochs) * NUM_PAIRS
    collected = {
        "original_ids": np.full((num_samples, MAX_TOKENS), PAD),
        "input_ids": np.full((num_samples, MAX_TOKENS), PAD),
        "labels": np.full((num_samples, MAX_TOKENS), -100),
        "masked_regions": np.zeros((num_samples, NUM_REGIONS), dtype=bool),
        "scored_regions": np.zeros((num_samples, NUM_REGIONS), dtype=bool),
        "is_negative": np.zeros(num_samples, dtype=bool),
        "is_in_batch": np.zeros(num_samples, dtype=bool),
        "captions": np.full(num_samples, "", dtype=object),
        "index": np.tile(np.arange(NUM_PAIRS), len(epochs)),
        "epoch": np.repeat(epochs, NUM_PAIRS),
    }
    for start in range(0, num_samples, BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        pairs.set_epoch(int(collected["epoch"][start]))
        samples = [pairs[index] for index in collected["index"][rows]]
        batch = {name: tensor.numpy() for name, tensor in collator(samples).items()}
        tokens = slice(batch["input_ids"].shape[1])
        collected["original_ids"][rows, tokens] = collator.original_ids
        collected["input_ids"][rows, tokens] = batch["input_ids"]
        collected["labels"][rows, tokens] = batch["labels"]
        collected["masked_regions"][rows] = (batch["region_features"] == 0).all(-1)
        collected["scored_regions"][rows] = batch["region_target_mask"]
        collected["is_negative"][rows] = batch["itm_labels"]
        collected["is_in_batch"][rows] = [sample["unfit_captions"] is not None for sample in samples]
        collected["captions"][rows] = collator.captions
    return Samples(**collected)


@dataclass
class Samples:
    """What [`collect`] has collected, and what follows from it."""

    original_ids: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    masked_regions: np.ndarray
    scored_regions: np.ndarray
    is_negative: np.ndarray
    is_in_batch: np.ndarray
    captions: np.ndarray
    index: np.ndarray
    epoch: np.ndarray

    def __post_init__(self):
        self.image = self.index // CAPTIONS_PER_IMAGE
        self.is_hard = np.array([caption.startswith("hard") for caption in self.captions])
        self.is_word = self.original_ids >= len(SPECIAL_TOKENS)
        # Conditional masking: words in one half of the samples, regions in the other.
        self.masks_text = (self.index + self.epoch) % 2 == 0

    def __add__(self, other):
        names = [field.name for field in fields(self)]
        return Samples(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL_TOKENS, *WORDS]))
    return BertTokenizer(str(vocabulary))


@pytest.fixture(scope="module")
def first_stage(tokenizer):
    return collect("mlm,mom,itm", range(EPOCHS_PER_STAGE), tokenizer)


@pytest.fixture(scope="module")
def second_stage(tokenizer):
    return collect("msm,mrm,itm", range(EPOCHS_PER_STAGE, 2 * EPOCHS_PER_STAGE), tokenizer)


@pytest.fixture(scope="module")
def samples(first_stage, second_stage):
    return first_stage + second_stage


def assert_share(happened, probability):
    """The number of events is within five standard deviations of the sum of their probabilities: one for all of them,
    or one for each."""
    happened = np.asarray(happened)
    probabilities = np.broadcast_to(probability, happened.shape)
    assert happened.size > 500
    deviation = np.sqrt((probabilities * (1 - probabilities)).sum())
    assert abs(happened.sum() - probabilities.sum()) < 5 * deviation, (happened.mean(), probabilities.mean())


# ---------------------------------------------------------------- words


def test_masked_words(first_stage):
    matches = first_stage.masks_text & ~first_stage.is_negative
    assert_share((first_stage.labels != -100)[matches[:, None] & first_stage.is_word], 0.15)


def test_masked_segments(second_stage):
    # A word stays if it is no anchor, the one before is none with 1 or 2 following ones, and the one before that is
    # none with 2. [CLS] is at 0: the words before 3 have fewer before them.
    expected = 1 - 0.9 * (1 - 0.1 * 2 / 3) * (1 - 0.1 * 1 / 3)
    matches = second_stage.masks_text & ~second_stage.is_negative
    for position in (3, 4, 8, 12):
        # Those before it are words, too.
        chosen = matches & second_stage.is_word[:, 1 : position + 1].all(axis=1)
        assert_share(second_stage.labels[chosen, position] != -100, expected)
    # The first word is masked as an anchor only; the second one also behind the first.
    assert_share(second_stage.labels[matches, 1] != -100, 0.1)
    assert_share(second_stage.labels[matches, 2] != -100, 1 - 0.9 * (1 - 0.1 * 2 / 3))


def test_lengths_of_segments(second_stage):
    """
    Masked words behind one that is not masked begin with an anchor. How far such a run goes on from there, with r words
    still covered: of r = 0, 1, 2 behind the anchor each has 1/3. The next word is an anchor with 0.1, and covers 0, 1
    or 2 more unless more are covered already; otherwise r falls by 1, or, at 0, the run ends. After n words

        n = 1:  r = 0: 1/3       r = 1: 1/3
        n = 2:  r = 0: 1/3 · 0.1/3 + 1/3 · (0.9 + 0.1/3) = 0.32222
                r = 1: 1/3 · 0.1/3 + 1/3 · 0.1/3 + 1/3 · (0.9 + 0.2/3) = 0.34444
        n = 3:  r = 0: 0.32222 · 0.1/3 + 0.34444 · (0.9 + 0.1/3) = 0.33222

    and of each 0.9 end there: 0.3, 0.29 and 0.299. Without other anchors it would be 1/3 each.
    """
    chosen = second_stage.masks_text & ~second_stage.is_negative
    masked, is_word = (second_stage.labels != -100)[chosen], second_stage.is_word[chosen]
    before = np.pad(masked, ((0, 0), (1, 0)))[:, :-1]
    rows, starts = np.nonzero(masked & ~before)
    # With three words behind the first: none of the first three lengths is cut off.
    following = starts[:, None] + [1, 2, 3]
    is_whole = (following < MAX_TOKENS).all(axis=1)
    is_whole[is_whole] = is_word[rows[is_whole, None], following[is_whole]].all(axis=1)
    second, third, fourth = masked[rows[is_whole, None], following[is_whole]].T
    assert_share(~second, 0.3)
    assert_share(second & ~third, 0.29)
    assert_share(second & third & ~fourth, 0.299)


def test_what_becomes_of_masked_words(samples):
    selected = samples.labels != -100
    now, before = samples.input_ids[selected], samples.original_ids[selected]
    np.testing.assert_array_equal(samples.labels[selected], before)
    assert_share(now == MASK, 0.8)
    # A random word is the one that was there once in 200 times.
    assert_share(now == before, 0.1 + 0.1 / len(WORDS))
    assert_share((now != MASK) & (now != before), 0.1 * (1 - 1 / len(WORDS)))
    random_words = now[(now != MASK) & (now != before)]
    assert random_words.min() >= len(SPECIAL_TOKENS)
    # Random words are uniform: each of 200 is one of 199 where it is not the word that was there.
    for word in range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(WORDS)):
        others = before[(now != MASK) & (now != before)] != word
        assert_share(random_words[others] == word, 1 / (len(WORDS) - 1))


def test_special_tokens_are_neither_masked_nor_scored(samples):
    is_special = ~samples.is_word
    assert {PAD, UNK, CLS, SEP} == set(np.unique(samples.original_ids[is_special]).tolist())
    np.testing.assert_array_equal(samples.input_ids[is_special], samples.original_ids[is_special])
    assert (samples.labels[is_special] == -100).all()


# ---------------------------------------------------------------- regions


def overlaps_in_whole_numbers():
    """Whether two regions of an image have an intersection over union above 2/5, bool `(images, 8, 8)`, without a
    division: 5 times the intersection is above 2 times the union. A region overlaps itself."""
    x1, y1, x2, y2 = np.moveaxis(BOXES.astype(np.int64), -1, 0)
    widths = np.minimum(x2[:, :, None], x2[:, None]) - np.maximum(x1[:, :, None], x1[:, None])
    heights = np.minimum(y2[:, :, None], y2[:, None]) - np.maximum(y1[:, :, None], y1[:, None])
    intersections = widths.clip(min=0) * heights.clip(min=0)
    areas = (x2 - x1) * (y2 - y1)
    unions = areas[:, :, None] + areas[:, None] - intersections
    assert (5 * intersections == 2 * unions)[unions > 0].any()  # exactly the threshold
    return (5 * intersections > 2 * unions) | np.eye(NUM_REGIONS, dtype=bool)


def test_masked_regions(first_stage):
    assert_share(first_stage.masked_regions[~first_stage.masks_text], 0.15)


def test_masked_overlapping_regions(second_stage):
    overlaps = overlaps_in_whole_numbers()
    chosen = ~second_stage.masks_text
    overlaps, masked = overlaps[second_stage.image[chosen]], second_stage.masked_regions[chosen]
    # What is masked is the sum of anchors with all that overlaps them: an anchor is a masked region whose overlapping
    # ones are all masked, and every masked region overlaps one.
    may_be_anchor = (masked[:, None, :] | ~overlaps).all(axis=2)
    assert ((overlaps & may_be_anchor[:, None, :]).any(axis=2) == masked).all()
    # A region stays if neither it nor one of those that overlap it is an anchor.
    numbers = overlaps.sum(axis=2)
    assert numbers.max() >= 4
    for region in range(NUM_REGIONS):
        assert_share(masked[:, region], 1 - 0.85 ** numbers[:, region])


# ---------------------------------------------------------------- pairs


def test_half_of_the_pairs_are_negatives(samples):
    assert_share(samples.is_negative, 0.5)
    # In every epoch anew: in both of two epochs a pair is a negative with 1/4.
    is_negative = samples.is_negative.reshape(-1, NUM_PAIRS)
    assert_share(is_negative[::2] & is_negative[1::2], 0.25)


def test_kinds_of_negatives(samples):
    assert not (samples.is_in_batch & ~samples.is_negative).any()
    assert not (samples.is_hard & ~samples.is_negative).any()
    assert not (samples.is_in_batch & samples.is_hard).any()
    negatives = samples.is_negative
    assert_share(samples.is_hard[negatives], HARD_SHARE)
    assert_share(samples.is_in_batch[negatives], IN_BATCH_SHARE)
    assert_share(~samples.is_hard[negatives] & ~samples.is_in_batch[negatives], 1 - HARD_SHARE - IN_BATCH_SHARE)
    # Of the two hard negatives that an image has each is drawn as often.
    assert_share(samples.captions[samples.is_hard] == HARD_NEGATIVES[0][1], 0.5)


def test_no_negative_matches_by_accident(samples):
    texts = {text: number for number, text in enumerate(sorted({c.lower().strip() for c in samples.captions}))}
    is_caption = np.zeros((NUM_IMAGES, len(texts)), dtype=bool)
    for image, captions in enumerate(CAPTIONS):
        is_caption[image, [texts[caption] for caption in captions]] = True
    drawn = np.array([texts[caption.lower().strip()] for caption in samples.captions])
    matches = is_caption[samples.image, drawn]
    np.testing.assert_array_equal(matches, ~samples.is_negative)
    is_random = samples.is_negative & ~samples.is_hard & ~samples.is_in_batch
    for kind in (samples.is_hard, samples.is_in_batch, is_random):
        assert kind.sum() > 10_000
        assert not matches[kind].any()
    # All texts that do not match are drawn.
    assert len(np.unique(drawn[is_random])) == len(np.unique(drawn[samples.is_in_batch])) == 60


def test_nothing_is_scored_on_negatives(samples):
    assert (samples.labels[samples.is_negative] == -100).all()
    assert not samples.scored_regions[samples.is_negative].any()
    # What is masked in the others is scored.
    np.testing.assert_array_equal(
        samples.scored_regions[~samples.is_negative], samples.masked_regions[~samples.is_negative]
    )


@pytest.mark.parametrize("name, share", [("first_stage", 0.15), ("second_stage", 0.1)])
def test_negatives_are_masked_like_the_others(request, name, share):
    """Masks must not tell which pairs match. The first word of a text is masked as an anchor only."""
    stage = request.getfixturevalue(name)
    for is_negative in (False, True):
        chosen = stage.masks_text & stage.is_word[:, 1] & (stage.is_negative == is_negative)
        assert_share(stage.input_ids[chosen, 1] == MASK, 0.8 * share)


# ---------------------------------------------------------------- masks


def test_one_modality_is_masked_at_a_time(samples):
    masked_text = ((samples.input_ids != samples.original_ids) | (samples.labels != -100)).any(axis=1)
    masked_image = samples.masked_regions.any(axis=1)
    assert not masked_text[~samples.masks_text].any()
    assert not masked_image[samples.masks_text].any()
    # Words in one epoch, regions in the next.
    masks_text = samples.masks_text.reshape(-1, NUM_PAIRS)
    assert (masks_text[:-1] != masks_text[1:]).all()


def test_masks_of_an_epoch_are_independent_of_those_of_another(first_stage):
    # Two masks agree in a word with 0.15² + 0.85² = 0.745, and of n words with 0.745 ** n.
    selected = (first_stage.labels != -100).reshape(-1, NUM_PAIRS, MAX_TOKENS)
    is_counted = (first_stage.masks_text & ~first_stage.is_negative).reshape(-1, NUM_PAIRS)
    num_words = first_stage.is_word.sum(axis=1).reshape(-1, NUM_PAIRS)
    # A pair's words are masked in every other epoch: 0 and 2, 1 and 3, 4 and 6 …
    epochs = np.array([epoch for epoch in range(EPOCHS_PER_STAGE - 2) if epoch % 4 < 2])
    both = is_counted[epochs] & is_counted[epochs + 2]
    equal = (selected[epochs] == selected[epochs + 2]).all(axis=2)
    assert_share(equal[both], 0.745 ** num_words[epochs][both])
    # Of regions the same, also of negatives.
    masked = first_stage.masked_regions.reshape(-1, NUM_PAIRS, NUM_REGIONS)
    both = ~first_stage.masks_text.reshape(-1, NUM_PAIRS)[epochs]
    assert_share((masked[epochs] == masked[epochs + 2]).all(axis=2)[both], 0.745**NUM_REGIONS)
