"""Captions, and the captions and images that they are told apart from."""

from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertTokenizer

from processing import CaptionedImages, InterBERTProcessor, RegionDataset
from processing.tasks import RetrievalCollator, RetrievalExamples

CAPTIONS = [
    ["a red dog", "a dog runs"],
    ["A  Red dog"],  # says what image 0 has, too
    ["a blue cat", "a cat sits"],
    [],
    ["a green bird"],
    ["two birds"],
    ["a small bird"],
]
HARD_NEGATIVES = [["a cat sits", "a green bird"], [], ["a dog runs"], [], ["two birds", "a small bird"], [], []]
HARD_IMAGE_IDS = [["i2", "i4"], [], ["i0"], [], ["i5", "i6"], [], []]
USABLE = {0, 1, 2, 4, 5, 6}


def make_images(hard_negatives=True, hard_image_ids=True) -> CaptionedImages:
    """The features of image i are all i."""
    counts = [1 + i % 3 for i in range(7)]
    columns = {
        "image_id": [f"i{i}" for i in range(7)],
        "width": pa.array([10] * 7, pa.int32()),
        "height": pa.array([10] * 7, pa.int32()),
        "boxes": pa.array([[[0, 0, 5, 5]] * n for n in counts], pa.list_(pa.list_(pa.float32(), 4))),
        "features": pa.array([[[float(i)] * 2] * n for i, n in enumerate(counts)], pa.list_(pa.list_(pa.float32(), 2))),
        "captions": pa.array(CAPTIONS, pa.list_(pa.string())),
    }
    if hard_negatives:
        columns["hard_negatives"] = pa.array(HARD_NEGATIVES, pa.list_(pa.string()))
    if hard_negatives and hard_image_ids:
        columns["hard_negatives_image_ids"] = pa.array(HARD_IMAGE_IDS, pa.list_(pa.string()))
    return CaptionedImages(RegionDataset(datasets.Dataset(pa.table(columns))))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    words = sorted({word for captions in CAPTIONS for caption in captions for word in caption.lower().split()})
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return InterBERTProcessor(BertTokenizer(str(vocabulary)), region_feature_size=2)


def row_of(record) -> int:
    return int(record["image_id"].removeprefix("i"))


def normalized(caption: str) -> str:
    return " ".join(caption.lower().split())


def test_captions_are_numbered_image_by_image():
    images = make_images()
    assert len(images) == 8 and images.num_skipped_images == 1
    assert [images.locate(i) for i in range(8)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (4, 0), (5, 0), (6, 0)]
    assert set(images.usable_images.tolist()) == USABLE
    assert images.lengths().tolist() == [[1, 9], [1, 10], [2, 10], [3, 10], [3, 10], [2, 12], [3, 9], [1, 12]]


def test_other_images_never_have_the_caption():
    images, drawn = make_images(), Counter()
    for seed in range(300):
        rows = images.draw_images("a red dog", 0, 3, np.random.default_rng(seed))
        assert len(set(rows)) == 3
        drawn.update(rows)
    assert drawn.keys() == {2, 4, 5, 6}  # not 1, whose caption differs in case and white space alone
    assert all(160 < count < 290 for count in drawn.values())  # 225 expected


def test_hard_images_come_first_as_far_as_there_are_any():
    images = make_images()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        assert set(images.draw_images("a red dog", 0, 3, rng, num_hard=2)[:2]) == {2, 4}
        assert images.draw_images("a blue cat", 2, 2, rng, num_hard=2)[0] == 0
        assert images.draw_images("two birds", 5, 2, rng, num_hard=2) != []  # without hard negatives: random ones
    # Image 0 says "a red dog" of image 1's only other: no hard image may have the caption.
    assert 0 not in images.draw_images("a Red dog", 1, 3, np.random.default_rng(0), num_hard=3)


def test_no_image_left_to_draw():
    with pytest.raises(ValueError, match="Found only 5 of 6 images without the caption 'two birds'"):
        make_images().draw_images("two birds", 5, 6, np.random.default_rng(0))


def test_samples_of_the_paper():
    examples = RetrievalExamples(make_images(), hard_negative_share=0.5, seed=3)
    assert len(examples) == 8
    for index in range(8):
        sample = examples[index]
        image, number = examples.images.locate(index)
        assert sample["captions"] == [CAPTIONS[image][number]] * 4
        rows = [row_of(record) for record in sample["records"]]
        assert rows[0] == image and len(set(rows)) == 4
        for row in rows[1:]:
            assert normalized(sample["captions"][0]) not in {normalized(caption) for caption in CAPTIONS[row]}


def test_samples_of_the_release():
    # Its pairs are of one other image each, whatever the number of negatives of the paper's choice.
    assert len(RetrievalExamples(make_images(), negatives="pairs", num_negatives=6)) > 0
    examples = RetrievalExamples(make_images(), negatives="pairs")
    hard = set()
    for epoch in range(30):
        examples.set_epoch(epoch)
        sample = examples[0]
        assert [row_of(record) for record in sample["records"]][:2] == [0, 0] and row_of(sample["records"][3]) == 0
        assert sample["captions"][0] == sample["captions"][2] == "a red dog"
        assert row_of(sample["records"][2]) in {2, 4, 5, 6}
        own = {"a red dog", "a dog runs"}
        assert normalized(sample["captions"][1]) not in own and sample["captions"][3] not in own
        hard.add(sample["captions"][3])
    assert hard == {"a cat sits", "a green bird"}


def test_draws_depend_on_seed_epoch_and_index_alone():
    def draws(seed, epoch):
        examples = RetrievalExamples(make_images(), seed=seed)
        examples.set_epoch(epoch)
        return [[row_of(record) for record in examples[index]["records"]] for index in (5, 0, 3, 0)]

    assert draws(1, 2) == draws(1, 2) != draws(1, 3)
    assert draws(1, 2) != draws(2, 2)
    assert draws(1, 2)[1] == draws(1, 2)[3]


@pytest.mark.parametrize("loss", ["choice", "pairs"])
def test_batches(processor, loss):
    examples = RetrievalExamples(make_images(), num_negatives=2)
    samples = [examples[0], examples[6]]
    batch = RetrievalCollator(processor, loss, max_regions=2)(samples)
    rows = torch.tensor([[row_of(record) for record in sample["records"]] for sample in samples])
    shape = (2, 3) if loss == "choice" else (6,)
    assert batch["region_features"].shape == (*shape, 2, 2)
    first_features = batch["region_features"].view(6, 2, 2)[:, 0, 0]
    assert first_features.tolist() == rows.flatten().tolist()
    assert batch["region_attention_mask"].view(6, 2).sum(dim=1).tolist() == [
        min(2, 1 + row % 3) for row in rows.flatten()
    ]
    assert batch["input_ids"].shape == (*shape, 5)  # [CLS] a red dog [SEP]
    texts = processor.tokenizer.batch_decode(batch["input_ids"].view(6, 5), skip_special_tokens=True)
    assert texts == ["a red dog"] * 3 + ["two birds"] * 3
    if loss == "choice":
        assert batch["labels"].tolist() == [0, 0] and "itm_labels" not in batch
    else:
        assert batch["itm_labels"].tolist() == [0, 1, 1, 0, 1, 1] and "labels" not in batch


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"negatives": "texts"}, r"one of \['images', 'pairs'\], got 'texts'"),
        ({"num_negatives": 0}, "`num_negatives` must be at least 1, got 0"),
        ({"num_negatives": 6}, "6 other images for each need 7 images with captions, got 6"),
        ({"hard_negative_share": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RetrievalExamples(make_images(), **arguments)


@pytest.mark.parametrize("arguments", [{"negatives": "pairs"}, {"hard_negative_share": 0.1}])
def test_hard_negatives_need_their_column(arguments):
    with pytest.raises(ValueError, match="need the column 'hard_negatives', which examples/mine_hard_negatives.py"):
        RetrievalExamples(make_images(hard_negatives=False), **arguments)
    # Which images they are captions of is needed, too: by the sample of an image that has some.
    images = make_images(hard_image_ids=False)
    message = (
        "'hard_negatives_image_ids', which examples/mine_hard_negatives.py adds, .* again, without the column 'hard_"
    )
    with pytest.raises(ValueError, match=message):
        RetrievalExamples(images, **arguments)
    images.check_hard_negatives()  # of pretraining


def test_bad_loss(processor):
    with pytest.raises(ValueError, match="`loss` must be 'choice' or 'pairs', got 'cosine'"):
        RetrievalCollator(processor, "cosine")
