import copy

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertTokenizer

from processing.pretraining import PretrainingCollator, PretrainingObjectives, PretrainingPairs
from processing.processing_interbert import InterBERTProcessor
from processing.region_dataset import RegionDataset

WIDTH = 4
NUM_CLASSES = 3
WORDS = ["a", "red", "blue", "green", "big", "small", "circle", "square", "star", "left", "right", "of"]
SPECIAL_IDS = [0, 1, 2, 3, 4]
# Few texts for many images: most random captions of other images are captions of the image as well, or differ from
# one only in case and white space.
TEXTS = [
    "a red circle",
    "A  red Circle",
    "a big blue square left of a star",
    "a small star",
    "green star",
    "a Small star",
]


def normalized(text):
    return " ".join(text.lower().split())


def make_dataset(num_images=30, captions=None, class_probs=True, region_counts=None, hard_negatives=None):
    rng = np.random.default_rng(0)
    columns = {name: [] for name in ("boxes", "features", "class_ids", "class_probs", "captions")}
    for i in range(num_images):
        n = 2 + i % 5 if region_counts is None else region_counts[i]
        corners = np.sort(rng.integers(0, 50, size=(n, 2, 2)), axis=1).reshape(n, 4)
        columns["boxes"].append(corners.astype(np.float32).tolist())
        columns["features"].append((rng.random((n, WIDTH)) + 0.5).astype(np.float16).tolist())
        columns["class_ids"].append(rng.integers(-1, NUM_CLASSES, size=n).tolist())
        columns["class_probs"].append(rng.random((n, NUM_CLASSES + 1)).astype(np.float16).tolist())
        columns["captions"].append([TEXTS[i % 6], TEXTS[(i + 2) % 6]] if captions is None else captions[i])
    table = pa.table(
        {
            "image_id": [f"image-{i}" for i in range(num_images)],
            "width": pa.array([50] * num_images, pa.int32()),
            "height": pa.array([50] * num_images, pa.int32()),
            "boxes": pa.array(columns["boxes"], pa.list_(pa.list_(pa.float32(), 4))),
            "features": pa.array(columns["features"], pa.list_(pa.list_(pa.float16(), WIDTH))),
            "class_ids": pa.array(columns["class_ids"], pa.list_(pa.int32())),
            "class_probs": pa.array(columns["class_probs"], pa.list_(pa.list_(pa.float16(), NUM_CLASSES + 1))),
            "captions": pa.array(columns["captions"], pa.list_(pa.string())),
        }
    )
    if not class_probs:
        table = table.drop_columns(["class_probs"])
    if hard_negatives is not None:
        table = table.append_column("hard_negatives", pa.array(hard_negatives, pa.list_(pa.string())))
    return RegionDataset(datasets.Dataset(table))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return InterBERTProcessor(BertTokenizer(str(vocabulary)), region_feature_size=WIDTH)


def all_samples(pairs):
    return [pairs[i] for i in range(len(pairs))]


# Pairs


def test_one_pair_for_each_caption():
    captions = [["a", "b"], [], ["c"], None, ["d", "e", "f"], ["g"]]
    dataset = make_dataset(6, captions=captions, region_counts=[1, 1, 1, 1, 2, 0])
    pairs = PretrainingPairs(dataset, objectives="mlm,mom")
    # Two images have no captions, one has no regions.
    assert pairs.num_skipped_images == 3
    assert len(pairs) == 6
    samples = all_samples(pairs)
    assert [sample["caption"] for sample in samples] == ["a", "b", "c", "d", "e", "f"]
    assert [sample["record"]["image_id"] for sample in samples] == [f"image-{i}" for i in (0, 0, 2, 4, 4, 4)]
    assert [sample["index"] for sample in samples] == [0, 1, 2, 3, 4, 5]
    assert pairs[-1]["caption"] == "f"
    with pytest.raises(IndexError, match="6 is out of range for 6 pairs"):
        pairs[6]


def test_half_of_the_pairs_are_negatives_and_none_by_accident():
    dataset = make_dataset()
    pairs = PretrainingPairs(dataset)
    own_texts = [{normalized(text) for text in dataset.captions(i)} for i in range(len(dataset))]
    everything = {normalized(text) for text in TEXTS}
    labels, drawn = [], set()
    for epoch in range(80):
        pairs.set_epoch(epoch)
        for index, sample in enumerate(all_samples(pairs)):
            labels.append(sample["itm_label"])
            image = index // 2
            assert sample["record"]["image_id"] == f"image-{image}"
            if sample["itm_label"] == 0:
                assert sample["caption"] == dataset.captions(image)[index % 2]
            else:
                assert normalized(sample["caption"]) not in own_texts[image]
                drawn.add((image, normalized(sample["caption"])))
    assert set(labels) == {0, 1}
    assert np.mean(labels) == pytest.approx(0.5, abs=0.03)  # of 4,800
    # Every text that may be drawn for an image is.
    assert drawn == {(i, text) for i in range(len(dataset)) for text in everything - own_texts[i]}


def test_negatives_follow_the_objectives_and_their_probability():
    pairs = PretrainingPairs(make_dataset(), negative_probability=1.0)
    assert all(sample["itm_label"] == 1 for sample in all_samples(pairs))
    pairs.set_objectives(("mlm", "mom"))
    assert all(sample["itm_label"] is None for sample in all_samples(pairs))
    assert [sample["caption"] for sample in all_samples(pairs)][:2] == [TEXTS[0], TEXTS[2]]
    pairs.set_objectives("msm,mrm,itm")
    assert all(sample["itm_label"] == 1 for sample in all_samples(pairs))


def test_wrong_arguments_of_pairs():
    with pytest.raises(ValueError, match="None of 2 images has regions and captions in column 'captions'"):
        PretrainingPairs(make_dataset(2, captions=[[], []]))
    with pytest.raises(ValueError, match="captions of at least 2 images, got 1"):
        PretrainingPairs(make_dataset(2, captions=[["a"], []]))
    with pytest.raises(ValueError, match="no caption of another image that differs from the captions of row"):
        all_samples(PretrainingPairs(make_dataset(2, captions=[["a star"], ["A star"]]), negative_probability=1.0))
    with pytest.raises(ValueError, match="`seed` must not be negative, got -1"):
        PretrainingPairs(make_dataset(2), seed=-1)
    with pytest.raises(ValueError, match="`negative_probability` must be between 0 and 1, got 2"):
        PretrainingPairs(make_dataset(2), negative_probability=2)
    with pytest.raises(ValueError, match="no column 'titles'"):
        PretrainingPairs(make_dataset(2), caption_column="titles")


# Kinds of negatives


def test_hard_negatives_come_from_the_list_of_the_image():
    # The image itself has one of the captions in its list, one list is empty, one image has none but its own.
    captions = [["a red circle", "a big square"], ["a star"], ["green star"]]
    hard_negatives = [["a red star", "A  red Circle", "a blue circle"], [], ["Green Star"]]
    dataset = make_dataset(3, captions=captions, hard_negatives=hard_negatives)
    pairs = PretrainingPairs(dataset, negative_probability=1.0, hard_negative_share=1.0)
    drawn = {0: [], 1: [], 2: [], 3: []}
    for epoch in range(300):
        pairs.set_epoch(epoch)
        for sample in all_samples(pairs):
            assert sample["itm_label"] == 1
            drawn[sample["index"]].append(sample["caption"])
    for index in (0, 1):
        assert set(drawn[index]) == {"a red star", "a blue circle"}
        assert drawn[index].count("a red star") == pytest.approx(150, abs=40)
    # Where no hard negative is left, the negative is a random one.
    assert set(drawn[2]) == {"a red circle", "a big square", "green star"}
    assert set(drawn[3]) == {"a red circle", "a big square", "a star"}


def test_in_batch_negatives_are_the_captions_of_other_samples(processor):
    captions = [["a red circle", "a big square"], ["A  red Circle", "a star"], ["green star", "green star"]]
    dataset = make_dataset(3, captions=captions)
    pairs = PretrainingPairs(dataset, negative_probability=0.8, in_batch_negative_share=1.0, objectives="itm")
    collator = PretrainingCollator(processor, "itm")
    drawn = {index: [] for index in range(6)}
    labels = []
    for epoch in range(300):
        pairs.set_epoch(epoch)
        samples = all_samples(pairs)
        # The pairs alone match still.
        assert [sample["caption"] for sample in samples] == sum(captions, [])
        assert [sample["itm_label"] for sample in samples] == [0] * 6
        batch = collator(samples)
        labels.append(batch["itm_labels"].tolist())
        for index, label in enumerate(labels[-1]):
            assert label == (samples[index]["unfit_captions"] is not None)
            text = processor.tokenizer.decode(batch["input_ids"][index], skip_special_tokens=True)
            if label == 1:
                drawn[index].append(text)
            else:
                assert text == normalized(samples[index]["caption"])
    assert np.mean(labels) == pytest.approx(0.8, abs=0.04)
    # "a red circle" is a caption of the first two images.
    for index in (0, 1):
        assert set(drawn[index]) == {"a star", "green star"}
        assert drawn[index].count("green star") / len(drawn[index]) == pytest.approx(2 / 3, abs=0.12)
    assert set(drawn[2]) == set(drawn[3]) == {"a big square", "green star"}
    assert set(drawn[4]) == set(drawn[5]) == {"a red circle", "a big square", "a star"}


def test_in_batch_negatives_need_another_sample_that_fits(processor):
    dataset = make_dataset(3, captions=[["a star", "green star"], ["A Star"], ["a red circle"]])
    pairs = PretrainingPairs(dataset, negative_probability=1.0, in_batch_negative_share=1.0)
    collator = PretrainingCollator(processor)
    for indices, labels in (([0], [0]), ([0, 1, 2], [0, 0, 1]), ([0, 1, 2, 3], [1, 1, 1, 1])):
        batch = collator([pairs[index] for index in indices])
        assert batch["itm_labels"].tolist() == labels
        # A pair that goes on matching is scored as one.
        scored = (batch["labels"] != -100).any(1) | batch["region_target_mask"].any(1)
        assert not scored[batch["itm_labels"] == 1].any()
    matches = 0
    for epoch in range(50):
        pairs.set_epoch(epoch)
        batch = collator([pairs[0], pairs[2]])
        matches += int((batch["labels"][0] != -100).any() | batch["region_target_mask"][0].any())
    assert matches > 10


def test_original_captions_are_given_away_in_a_batch(processor):
    """A sample whose own caption was replaced lends that caption, not the one it got."""
    dataset = make_dataset(
        4, captions=[["a star"], ["a red circle"], ["a big square"], ["green"]], hard_negatives=[["small"]] * 4
    )
    pairs = PretrainingPairs(dataset, negative_probability=1.0, objectives="itm")
    pairs.set_negative_shares(0.5, 0.5)
    collator = PretrainingCollator(processor, "itm")
    texts = {"hard": set(), "in_batch": set()}
    for epoch in range(100):
        pairs.set_epoch(epoch)
        samples = all_samples(pairs)
        batch = collator(samples)
        assert batch["itm_labels"].tolist() == [1, 1, 1, 1]
        for sample, input_ids in zip(samples, batch["input_ids"], strict=True):
            kind = "hard" if sample["unfit_captions"] is None else "in_batch"
            texts[kind].add(processor.tokenizer.decode(input_ids, skip_special_tokens=True))
    assert texts == {"hard": {"small"}, "in_batch": {"a star", "a red circle", "a big square", "green"}}


def test_masks_of_in_batch_negatives_do_not_depend_on_the_batch(processor):
    texts = [["a star left of a circle"], ["a red circle of a square"], ["a big square of a star"], ["green of"]]
    dataset = make_dataset(4, captions=texts)
    pairs = PretrainingPairs(dataset, negative_probability=1.0, in_batch_negative_share=1.0)
    collator = PretrainingCollator(processor)
    for epoch in range(20):
        pairs.set_epoch(epoch)
        # In a batch of two, in one of three, and alone, the captions are different ones of six words.
        batches = [collator([pairs[index] for index in indices]) for indices in ([0, 1], [0, 1, 2], [0])]
        assert [batch["itm_labels"][0].item() for batch in batches] == [1, 1, 0]
        regions = [masked_regions([], batch)[0] for batch in batches]
        assert torch.equal(regions[0], regions[1][: len(regions[0])])
        assert torch.equal(regions[0][: len(regions[2])], regions[2])
        words = [(batch["input_ids"][0] == 4).tolist() for batch in batches]
        assert words[0] == words[1] == words[2]


def test_shares_can_be_set_between_epochs(processor):
    dataset = make_dataset(hard_negatives=[["a blue star"]] * 30)
    pairs, plain = PretrainingPairs(dataset), PretrainingPairs(dataset)
    collator = PretrainingCollator(processor)

    def captions(pairs):
        return [sample["caption"] for sample in all_samples(pairs)]

    assert captions(pairs) == captions(plain)
    pairs.set_negative_shares(hard_negative_share=1.0)
    negatives = {sample["caption"] for sample in all_samples(pairs) if sample["itm_label"] == 1}
    assert negatives == {"a blue star"}
    pairs.set_negative_shares(0.25, 0.75)
    assert any(sample["unfit_captions"] for sample in all_samples(pairs))
    # Which pairs are negatives does not depend on their kind.
    labels = [sample["itm_label"] for sample in all_samples(plain)]
    assert collator(all_samples(pairs))["itm_labels"].tolist() == labels
    pairs.set_negative_shares()
    assert captions(pairs) == captions(plain)
    # Without matching there are no negatives of any kind.
    pairs.set_negative_shares(0.5, 0.5)
    pairs.set_objectives("mlm,mom")
    assert captions(pairs) == [caption for i in range(30) for caption in dataset.captions(i)]
    assert not any(sample["unfit_captions"] for sample in all_samples(pairs))


def test_wrong_shares():
    dataset = make_dataset(hard_negatives=[[]] * 30)
    with pytest.raises(ValueError, match="`hard_negative_share` must be between 0 and 1, got -0.5"):
        PretrainingPairs(dataset, hard_negative_share=-0.5)
    with pytest.raises(ValueError, match="`in_batch_negative_share` must be between 0 and 1, got 2"):
        PretrainingPairs(dataset, in_batch_negative_share=2)
    with pytest.raises(ValueError, match="add up to at most 1, got 0.5 and 0.6"):
        PretrainingPairs(dataset, hard_negative_share=0.5, in_batch_negative_share=0.6)
    message = "need the column 'hard', which examples/mine_hard_negatives.py adds, .*'hard_negatives'"
    with pytest.raises(ValueError, match=message):
        PretrainingPairs(dataset, hard_negative_share=0.1, hard_negative_column="hard")
    pairs = PretrainingPairs(make_dataset(), in_batch_negative_share=1.0)
    with pytest.raises(ValueError, match="need the column 'hard_negatives'"):
        pairs.set_negative_shares(0.5, 0.5)
    assert (pairs.hard_negative_share, pairs.in_batch_negative_share) == (0.0, 1.0)


# Objectives


def test_objectives_in_any_order_and_subset():
    assert PretrainingObjectives.parse("itm, mom,mlm") == PretrainingObjectives("mlm", "mom", True)
    assert PretrainingObjectives.parse(["msm", "mrm"]) == PretrainingObjectives("msm", "mrm", False)
    assert PretrainingObjectives.parse(("itm",)) == PretrainingObjectives(None, None, True)


@pytest.mark.parametrize(
    "objectives, message",
    [
        ("mlm,mlp", r"some of \['mlm', 'msm', 'mom', 'mrm', 'itm'\], got \['mlp'\]"),
        ((), r"got \[\]"),
        ("mlm,msm,itm", r"one of the objectives \['mlm', 'msm'\] can be used at a time"),
        ("mom,mrm", r"one of the objectives \['mom', 'mrm'\] can be used at a time"),
        ("itm,itm", r"one of the objectives \['itm'\]"),
    ],
)
def test_wrong_objectives(objectives, message):
    with pytest.raises(ValueError, match=message):
        PretrainingObjectives.parse(objectives)


# Batches


def make_batches(dataset, processor, objectives="mlm,mom,itm", epochs=20, seed=0, **collator_arguments):
    """Yields (samples, batch) of whole epochs."""
    pairs = PretrainingPairs(dataset, objectives=objectives, seed=seed)
    collator = PretrainingCollator(processor, objectives=objectives, **collator_arguments)
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        samples = all_samples(pairs)
        yield samples, collator(samples)


def padded_features(samples):
    counts = [len(sample["record"]["features"]) for sample in samples]
    features = torch.zeros(len(samples), max(counts), WIDTH)
    for i, sample in enumerate(samples):
        features[i, : counts[i]] = torch.tensor(sample["record"]["features"].astype(np.float32))
    return features


def masked_regions(samples, batch):
    """No feature of the test data is 0: a region of zeros has been masked."""
    return (batch["region_features"] == 0).all(-1) & (batch["region_attention_mask"] == 1)


def test_batch_has_the_arguments_of_the_model(processor):
    ((samples, batch),) = make_batches(make_dataset(), processor, epochs=1)
    dtypes = {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "token_type_ids": torch.int64,
        "region_features": torch.float32,
        "region_boxes": torch.float32,
        "region_attention_mask": torch.int64,
        "labels": torch.int64,
        "region_targets": torch.int64,
        "region_target_mask": torch.int64,
        "itm_labels": torch.int64,
    }
    assert {name: tensor.dtype for name, tensor in batch.items()} == dtypes
    # The longest text has 8 words, with [CLS] and [SEP] 10; images have up to 6 regions.
    assert batch["input_ids"].shape == batch["labels"].shape == (60, 10)
    assert batch["region_features"].shape == (60, 6, WIDTH)
    assert batch["region_targets"].shape == batch["region_target_mask"].shape == (60, 6)
    assert batch["itm_labels"].tolist() == [sample["itm_label"] for sample in samples]
    assert batch["region_attention_mask"].sum(1).tolist() == [len(sample["record"]["boxes"]) for sample in samples]


@pytest.mark.parametrize(
    "objectives, keys",
    [
        ("mlm", {"labels"}),
        ("mrm", {"region_targets", "region_target_mask"}),
        ("itm", {"itm_labels"}),
        ("msm,itm", {"labels", "itm_labels"}),
    ],
)
def test_batch_has_only_the_labels_of_its_objectives(processor, objectives, keys):
    ((_, batch),) = make_batches(make_dataset(), processor, objectives, epochs=1)
    inputs = {"input_ids", "attention_mask", "token_type_ids"}
    inputs |= {"region_features", "region_boxes", "region_attention_mask"}
    assert set(batch) == inputs | keys


@pytest.mark.parametrize("objectives", ["mlm,mom,itm", "msm,mrm,itm"])
def test_labels_are_the_masked_words_of_matching_pairs(processor, objectives):
    tokenizer = processor.tokenizer
    num_masked = {0: 0, 1: 0}
    for samples, batch in make_batches(make_dataset(), processor, objectives):
        original = tokenizer([s["caption"] for s in samples], padding=True, return_tensors="pt")["input_ids"]
        changed = batch["input_ids"] != original
        special = torch.isin(original, torch.tensor(SPECIAL_IDS))
        assert not (changed & special).any()
        scored = batch["labels"] != -100
        assert not (scored & special).any()
        assert torch.equal(batch["labels"][scored], original[scored])
        matches = batch["itm_labels"] == 0
        assert not scored[~matches].any()
        assert not (changed & ~scored)[matches].any()
        # No random word is a special token, but for the mask token of the masked ones.
        assert not torch.isin(batch["input_ids"][changed], torch.tensor([0, 1, 2, 3])).any()
        for label in (0, 1):
            num_masked[label] += int((batch["input_ids"] == 4)[batch["itm_labels"] == label].sum())
    # Negatives are masked as much as the others.
    assert num_masked[0] > 100
    assert num_masked[1] / num_masked[0] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("objectives", ["mlm,mom,itm", "msm,mrm,itm"])
def test_region_targets_are_the_classes_of_masked_regions(processor, objectives):
    num_masked = {0: 0, 1: 0}
    num_without_class = 0
    for samples, batch in make_batches(make_dataset(), processor, objectives):
        masked = masked_regions(samples, batch)
        classes = torch.full(masked.shape, -1)
        for i, sample in enumerate(samples):
            classes[i, : len(sample["record"]["class_ids"])] = torch.tensor(sample["record"]["class_ids"].astype(int))
        assert torch.equal(batch["region_targets"], classes)
        matches = batch["itm_labels"] == 0
        expected = masked & (classes >= 0) & matches[:, None]
        assert torch.equal(batch["region_target_mask"], expected.long())
        num_without_class += int((masked & (classes < 0)).sum())
        # What is not masked is as it was.
        original = padded_features(samples)
        assert torch.equal(batch["region_features"], original * ~masked[..., None])
        for label in (0, 1):
            num_masked[label] += int(masked[batch["itm_labels"] == label].sum())
    assert num_without_class > 50
    assert num_masked[0] > 100
    assert num_masked[1] / num_masked[0] == pytest.approx(1, abs=0.25)


def test_only_masked_region_modeling_masks_overlapping_regions(processor):
    dataset = make_dataset()
    for objectives in ("mom", "mrm"):
        pairs = PretrainingPairs(dataset, objectives=objectives)
        samples = all_samples(pairs)
        for sample in samples:
            # Every region at the same place.
            sample["record"]["boxes"] = np.full_like(sample["record"]["boxes"], 0) + np.float32([0, 0, 10, 10])
        num_masked = masked_regions(samples, PretrainingCollator(processor, objectives)(samples)).sum(1)
        num_regions = torch.tensor([len(sample["record"]["boxes"]) for sample in samples])
        assert (num_masked > 0).any()
        all_or_none = (num_masked == 0) | (num_masked == num_regions)
        assert all_or_none.all() == (objectives == "mrm")


def test_soft_class_and_feature_targets(processor):
    dataset = make_dataset()
    for samples, batch in make_batches(dataset, processor, "mom", epochs=1, region_objective="feature"):
        assert batch["region_target_mask"].any()
        assert torch.equal(batch["region_targets"], padded_features(samples))
        assert torch.equal(batch["region_target_mask"], masked_regions(samples, batch).long())
    for samples, batch in make_batches(dataset, processor, "mrm", epochs=1, region_objective="soft_class"):
        assert batch["region_targets"].dtype == torch.float32
        assert batch["region_targets"].shape == (60, 6, NUM_CLASSES + 1)
        for i, sample in enumerate(samples):
            probabilities = sample["record"]["class_probs"].astype(np.float32)
            np.testing.assert_array_equal(batch["region_targets"][i, : len(probabilities)], probabilities)
            assert not batch["region_targets"][i, len(probabilities) :].any()
        # A class of −1 does not matter here.
        assert torch.equal(batch["region_target_mask"], masked_regions(samples, batch).long())
    with pytest.raises(ValueError, match=r"'soft_class'` needs the column 'class_probs', .*'class_ids'"):
        next(make_batches(make_dataset(class_probs=False), processor, "mrm", region_objective="soft_class"))


def test_conditional_masking_alternates_by_sample_and_epoch(processor):
    masked_text, masked_image = np.zeros(2, dtype=int), np.zeros(2, dtype=int)
    for samples, batch in make_batches(make_dataset(), processor, "mlm,mom"):
        turns = np.array([(sample["index"] + sample["epoch"]) % 2 for sample in samples])
        text = (batch["labels"] != -100).any(1).numpy()
        image = masked_regions(samples, batch).any(1).numpy()
        for turn in (0, 1):
            masked_text[turn] += text[turns == turn].sum()
            masked_image[turn] += image[turns == turn].sum()
    assert masked_text[0] > 200
    assert masked_image[1] > 200
    assert masked_text[1] == masked_image[0] == 0


def test_without_conditional_masking_both_modalities_are_masked(processor):
    both = 0
    for samples, batch in make_batches(make_dataset(), processor, "mlm,mom", conditional_masking=False):
        both += int(((batch["labels"] != -100).any(1) & masked_regions(samples, batch).any(1)).sum())
    assert both > 200


def test_a_single_masking_objective_masks_every_sample(processor):
    """Conditional masking has nothing to choose from here: no sample may go unmasked because of it."""
    turns = {0: 0, 1: 0}
    for samples, batch in make_batches(make_dataset(), processor, "mlm,itm"):
        for sample, text in zip(samples, (batch["labels"] != -100).any(1).tolist(), strict=True):
            turns[(sample["index"] + sample["epoch"]) % 2] += text
    assert turns[0] > 100
    assert turns[1] > 100


def test_max_length_and_max_regions(processor):
    for samples, batch in make_batches(make_dataset(), processor, "mlm,mom", epochs=3, max_length=6, max_regions=3):
        assert batch["input_ids"].shape == batch["labels"].shape == (60, 6)
        assert (batch["input_ids"][:, 0] == 2).all()
        assert batch["region_features"].shape == (60, 3, WIDTH)
        assert batch["region_targets"].shape == (60, 3)
        masked = masked_regions(samples, batch)
        assert torch.equal(batch["region_features"], padded_features(samples)[:, :3] * ~masked[..., None])


# Determinism


def trimmed(batch, i):
    """One sample of a batch without its padding."""
    text, regions = batch["attention_mask"][i].bool(), batch["region_attention_mask"][i].bool()
    sample = {name: batch[name][i][text] for name in ("input_ids", "token_type_ids", "labels")}
    for name in ("region_features", "region_boxes", "region_targets", "region_target_mask"):
        sample[name] = batch[name][i][regions]
    sample["itm_labels"] = batch["itm_labels"][i]
    return sample


def assert_samples_equal(first, second):
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("objectives", ["mlm,mom,itm", "msm,mrm,itm"])
def test_samples_depend_neither_on_order_nor_on_batch_nor_on_worker(processor, objectives):
    pairs = PretrainingPairs(make_dataset(), objectives=objectives, seed=3)
    pairs.set_epoch(2)
    collator = PretrainingCollator(processor, objectives=objectives)
    whole = collator(all_samples(pairs))
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    for num_workers, batch_size in ((0, 1), (2, 7)):
        loader = torch.utils.data.DataLoader(
            pairs, batch_size=batch_size, sampler=order, collate_fn=collator, num_workers=num_workers
        )
        position = 0
        for batch in loader:
            for i in range(len(batch["input_ids"])):
                assert_samples_equal(trimmed(batch, i), trimmed(whole, order[position]))
                position += 1
        assert position == len(pairs)


def test_epochs_and_seeds_differ_and_repeat(processor):
    dataset = make_dataset()
    collator = PretrainingCollator(processor)

    def collate(pairs, epoch):
        pairs.set_epoch(epoch)
        return collator(all_samples(pairs))

    def equal(first, second):
        return first["labels"].shape == second["labels"].shape and all(torch.equal(first[k], second[k]) for k in first)

    pairs = PretrainingPairs(dataset, seed=1)
    first = collate(pairs, 0)
    other = collate(pairs, 1)
    assert not torch.equal(first["itm_labels"], other["itm_labels"])
    assert not equal(first, other)
    assert equal(first, collate(pairs, 0))
    assert equal(other, collate(PretrainingPairs(dataset, seed=1), 1))
    assert not equal(first, collate(PretrainingPairs(dataset, seed=2), 0))
    # For validation the epoch can be fixed.
    validation = PretrainingPairs(dataset, seed=1, fixed_epoch=1)
    assert equal(other, collate(validation, 0))
    assert equal(other, collate(validation, 5))


def test_second_stage(processor):
    pairs, collator = PretrainingPairs(make_dataset()), PretrainingCollator(processor)
    first = collator(all_samples(pairs))
    pairs.set_objectives("msm,mrm,itm")
    collator.set_objectives("msm,mrm,itm")
    second = collator(all_samples(pairs))
    # Segments are longer than words, overlapping regions more than single ones; the pairs stay the same.
    assert (second["labels"] != -100).sum() != (first["labels"] != -100).sum()
    assert torch.equal(first["itm_labels"], second["itm_labels"])
    one_stage = list(make_batches(make_dataset(), processor, "msm,mrm,itm", epochs=1))[0][1]
    assert all(torch.equal(second[name], one_stage[name]) for name in second)


def test_pairs_and_collator_must_agree_on_matching(processor):
    pairs, collator = PretrainingPairs(make_dataset(), objectives="mlm,mom"), PretrainingCollator(processor)
    with pytest.raises(ValueError, match="the same objectives; .* come with no matching labels"):
        collator([pairs[0]])
    pairs.set_objectives("mlm,itm")
    collator.set_objectives("mlm")
    with pytest.raises(ValueError, match="the same objectives; .* come with matching labels"):
        collator([pairs[0]])


def test_wrong_arguments_of_the_collator(processor):
    with pytest.raises(ValueError, match=r"one of \['hard_class', 'soft_class', 'feature'\], got 'class'"):
        PretrainingCollator(processor, region_objective="class")
    with pytest.raises(ValueError, match="`max_length` must be at least 3, .* got 2"):
        PretrainingCollator(processor, max_length=2)
    with pytest.raises(ValueError, match="`max_regions` must be at least 1, got 0"):
        PretrainingCollator(processor, max_regions=0)
    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="expected a tokenizer with `padding_side` 'right', got 'left'"):
        PretrainingCollator(processor)


def test_special_tokens_in_the_text_itself_are_not_masked(processor):
    # "zebra" is not in the vocabulary.
    dataset = make_dataset(2, captions=[["zebra [SEP] zebra [MASK]"] * 200, ["a star"]])
    for _, batch in make_batches(dataset, processor, "mlm", epochs=1):
        assert (batch["labels"][:200] == -100).all()
        assert (batch["input_ids"][:200] == torch.tensor([2, 1, 3, 1, 4, 3])).all()


@pytest.mark.parametrize("rows", [None, [4, 2, 2, 0, 3]])
def test_lengths_are_those_of_the_samples(rows):
    captions = [["one", "three"], [], ["红色"], None, ["a", "seven 7", "b"], ["no region"]]
    dataset = make_dataset(6, captions=captions, region_counts=[3, 1, 1, 1, 2, 0])
    if rows is not None:
        dataset = RegionDataset(dataset.dataset.select(rows))
    pairs = PretrainingPairs(dataset, objectives="mlm,mom")
    expected = [[len(sample["record"]["boxes"]), len(sample["caption"])] for sample in all_samples(pairs)]
    assert pairs.lengths().tolist() == expected
    assert len(expected) == (6 if rows is None else 7)


def test_a_sample_of_captions():
    captions = [["one", "three"], [], ["red"], ["a", "b", "c"], ["no region"]]
    pairs = PretrainingPairs(make_dataset(5, captions=captions, region_counts=[3, 1, 1, 1, 0]), objectives="mlm,mom")
    assert pairs.sample_captions(100) == ["one", "three", "red", "a", "b", "c"]
    assert pairs.sample_captions(3) == pairs.sample_captions(5) == ["one", "red", "b"]
    assert pairs.sample_captions(1) == ["one"]


@pytest.mark.parametrize("objectives, shares", [("mlm,mom", (0.4, 0.5)), ("msm,mrm", (0.4, 0.5))])
def test_masking_probabilities(processor, objectives, shares):
    settings = {"conditional_masking": False, "text_mask_probability": 0.4, "region_mask_probability": 0.5}
    never = settings | {"text_mask_probability": 0.0, "region_mask_probability": 0.0}
    dataset = make_dataset(60, region_counts=[4] * 60)
    shared = []
    for arguments in (settings, never):
        masked_words = words = masked_regions = regions = 0
        for samples, batch in make_batches(dataset, processor, objectives, **arguments):
            masked_words += int((batch["labels"] != -100).sum())
            words += int(batch["attention_mask"].sum() - 2 * len(samples))
            masked_regions += int((batch["region_features"].abs().sum(-1) == 0).sum())
            regions += batch["region_features"].shape[0] * 4
        shared.append((masked_words / words, masked_regions / regions))
    assert shared[1] == (0, 0)
    if objectives == "mlm,mom":
        np.testing.assert_allclose(shared[0], shares, atol=0.03)
    else:  # what follows an anchor, or overlaps it, is masked too
        assert shared[0][0] > 0.5 and shared[0][1] > 0.5
    with pytest.raises(ValueError, match="`text_mask_probability` must be between 0 and 1, got 2"):
        PretrainingCollator(processor, text_mask_probability=2)


def test_the_rate_of_masked_words_can_be_set_between_epochs(processor):
    pairs = PretrainingPairs(make_dataset(), objectives="mlm")
    collator = PretrainingCollator(processor, "mlm", text_mask_probability=0.3)
    shares = {}
    for rate in (0.3, 0.0, 1.0, None):
        collator.set_text_mask_probability(rate)
        batch = collator(all_samples(pairs))
        shares[rate] = float((batch["labels"] != -100).sum() / (batch["attention_mask"].sum() - 2 * len(pairs)))
    assert (shares[0.0], shares[1.0]) == (0, 1)
    assert 0 < shares[None] < shares[0.3] < 1
    default = PretrainingCollator(processor, "mlm")(all_samples(pairs))
    assert torch.equal(batch["input_ids"], default["input_ids"])
    with pytest.raises(ValueError, match="`text_mask_probability` must be between 0 and 1, got -1"):
        collator.set_text_mask_probability(-1)
