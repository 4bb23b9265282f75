import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_fixtures import assert_close, tiny_model
from transformers import AutoTokenizer, BertTokenizer

from modeling_interbert import InterBERTModel
from processing.processing_interbert import InterBERTProcessor, pad_regions

PROCESSOR_FILE = Path(__file__).resolve().parent.parent / "processing" / "processing_interbert.py"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "run", "##s", "on", "the", "mat"]


@pytest.fixture
def tokenizer(tmp_path):
    vocab_file = tmp_path / "bert" / "vocab.txt"
    vocab_file.parent.mkdir()
    vocab_file.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return BertTokenizer.from_pretrained(vocab_file.parent)


@pytest.fixture
def processor(tokenizer):
    return InterBERTProcessor(tokenizer, region_feature_size=3)


def one_region():
    """An image of 200 x 100 pixels."""
    return {"features": [[1.0, 2.0, 3.0]], "boxes": [[20.0, 10.0, 100.0, 50.0]], "width": 200, "height": 100}


def two_regions():
    """An image of 10 x 40 pixels."""
    return {
        "image_id": "cat.jpg",
        "features": [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]],
        "boxes": [[0.0, 0.0, 10.0, 40.0], [1.0, 20.0, 5.0, 30.0]],
        "width": 10,
        "height": 40,
    }


PADDED = {
    "region_features": [[[1, 2, 3], [0, 0, 0]], [[4, 5, 6], [7, 8, 9]]],
    # 20/200, 10/100, 100/200, 50/100; then the whole image; then 1/10, 20/40, 5/10, 30/40
    "region_boxes": [[[0.1, 0.1, 0.5, 0.5], [0, 0, 0, 0]], [[0, 0, 1, 1], [0.1, 0.5, 0.5, 0.75]]],
    "region_attention_mask": [[1, 0], [1, 1]],
}


def assert_padded(batch, expected=PADDED):
    for name, values in expected.items():
        dtype = np.int64 if name == "region_attention_mask" else np.float32
        array = np.asarray(batch[name])
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.array(values, dtype))


# Regions


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        lambda values: np.array(values, np.float16),
        lambda values: np.array(values, np.int32),
        torch.tensor,
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: torch.tensor(values, requires_grad=True),
        lambda values: [torch.tensor(row) for row in values],
    ],
    ids=["list", "float64", "float16", "int32", "torch", "bfloat16", "requires_grad", "list of tensors"],
)
def test_pad_regions_takes_lists_arrays_and_tensors(convert):
    regions = [one_region(), two_regions()]
    for item in regions:
        item.update({"features": convert(item["features"]), "boxes": convert(item["boxes"])})
    assert_padded(pad_regions(regions, 3))


def test_pad_regions_takes_scalars_of_any_kind():
    regions = [one_region(), two_regions()]
    regions[0].update({"width": np.int32(200), "height": torch.tensor(100)})
    regions[1].update({"width": 10.0, "height": np.float64(40)})
    assert_padded(pad_regions(regions, 3))


def test_pad_regions_mixes_precisions():
    regions = [one_region(), two_regions()]
    regions[0]["features"] = np.array(regions[0]["features"], np.float16)
    assert_padded(pad_regions(regions, 3))


def test_pad_regions_leaves_read_only_input_as_it_is():
    features = np.ones((2, 3), np.float32)
    boxes = np.array([[-1, 0, 5, 5], [0, 0, 11, 41]], np.float32)
    for array in (features, boxes):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = pad_regions([{**two_regions(), "features": features, "boxes": boxes}], 3)
    padded["region_features"][:] = 5
    np.testing.assert_array_equal(features, 1)
    np.testing.assert_array_equal(boxes, [[-1, 0, 5, 5], [0, 0, 11, 41]])


def test_boxes_up_to_one_pixel_outside_are_clipped():
    item = {**one_region(), "boxes": [[-1.0, -0.5, 201.0, 100.5]]}
    np.testing.assert_array_equal(pad_regions([item], 3)["region_boxes"], [[[0, 0, 1, 1]]])
    outside = {**one_region(), "boxes": [[-1.0, -1.0, -0.5, 0.0]]}
    np.testing.assert_array_equal(pad_regions([outside], 3)["region_boxes"], [[[0, 0, 0, 0]]])


def test_normalized_boxes_are_clipped_up_to_a_hundredth_of_the_image():
    """Boxes of an image of 1 x 1: the one pixel of other images would be all of it."""
    normalized = {**one_region(), "width": 1, "height": 1}
    item = {**normalized, "boxes": [[-0.01, 0.25, 1.01, 0.75]]}
    # Beside an image in pixels, each keeps its own rule.
    pixels = {**one_region(), "boxes": [[-1.0, 0.0, 201.0, 100.0]]}
    np.testing.assert_array_equal(
        pad_regions([item, pixels], 3)["region_boxes"], [[[0, 0.25, 1, 0.75]], [[0, 0, 1, 1]]]
    )
    for box in ([-0.02, 0, 1, 1], [0, 0, 1, 1.02]):
        message = r"regions\[1\], region 0: .* within \[0, 1\], as width and height are 1 \(at most 0.01 outside\), got"
        with pytest.raises(ValueError, match=message):
            pad_regions([pixels, {**normalized, "boxes": [box]}], 3)


def test_boxes_without_area_are_taken():
    item = {**one_region(), "boxes": [[50.0, 50.0, 50.0, 50.0]]}
    np.testing.assert_array_equal(pad_regions([item], 3)["region_boxes"], [[[0.25, 0.5, 0.25, 0.5]]])


def test_max_regions_keeps_the_first():
    padded = pad_regions([two_regions(), one_region()], 3, max_regions=1)
    expected = {
        "region_features": [[[4, 5, 6]], [[1, 2, 3]]],
        "region_boxes": [[[0, 0, 1, 1]], [[0.1, 0.1, 0.5, 0.5]]],
        "region_attention_mask": [[1], [1]],
    }
    assert_padded(padded, expected)
    assert_padded(pad_regions([one_region(), two_regions()], 3, max_regions=2))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": [[1.0, 2.0]] * 2}, "features of shape (regions, 3), got (2, 2)"),
        ({"features": [1.0, 2.0, 3.0]}, "features of shape (regions, 3), got (3,)"),
        ({"features": [[[1.0, 2.0, 3.0]] * 2]}, "features of shape (regions, 3), got (1, 2, 3)"),
        ({"features": [[1.0, 2.0, 3.0], [1.0]]}, "expected `features` to hold numbers in a regular array, got list"),
        ({"features": "features.npy"}, "expected `features` to hold numbers in a regular array, got str"),
        ({"boxes": [0.0, 0.0, 1.0, 1.0]}, "boxes of shape (regions, 4), got (4,)"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0, 1.0]] * 2}, "boxes of shape (regions, 4), got (2, 5)"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0]]}, "one box for each feature vector, got 2 feature vectors and 1 boxes"),
        ({"features": [], "boxes": []}, "at least one region, got features of shape (0,) and boxes of shape (0,)"),
        ({"features": np.zeros((0, 3)), "boxes": np.zeros((0, 4))}, "at least one region"),
        ({"width": 0}, "expected a width > 0 in pixels, got 0"),
        ({"height": -40}, "expected a height > 0 in pixels, got -40"),
        ({"height": NAN}, "expected a height > 0 in pixels, got nan"),
        ({"width": INF}, "expected a width > 0 in pixels, got inf"),
        ({"width": None}, "expected a width > 0 in pixels, got None"),
        ({"width": [10, 10]}, "expected a width > 0 in pixels, got [10, 10]"),
        ({"width": "wide"}, "expected `width` to hold numbers"),
    ],
)
def test_faulty_images_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape("regions[1] (image_id cat.jpg): ") + ".*" + re.escape(message)):
        pad_regions([one_region(), {**two_regions(), **changes}], 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": [[1.0, 2.0, 3.0], [1.0, NAN, 3.0]]}, "expected finite features, got nan at position 1"),
        ({"features": np.array([[1, 2, 3], [1, 2, -INF]], np.float16)}, "finite features, got -inf at position 2"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, NAN, 1.0]]}, "finite box, got [0.0, 0.0, nan, 1.0]"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [0.0, -INF, 1.0, 1.0]]}, "finite box, got [0.0, -inf, 1.0, 1.0]"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [5.0, 1.0, 4.0, 2.0]]}, "x1 <= x2 and y1 <= y2, got [5.0, 1.0, 4.0, 2.0]"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [1.0, 9.0, 4.0, 2.0]]}, "x1 <= x2 and y1 <= y2, got [1.0, 9.0, 4.0, 2.0]"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [-1.5, 0.0, 4.0, 2.0]]}, "within the image of 10 x 40 pixels"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [0.0, -2.0, 4.0, 2.0]]}, "within the image of 10 x 40 pixels"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 11.5, 2.0]]}, "within the image of 10 x 40 pixels"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 4.0, 41.5]]}, "within the image of 10 x 40 pixels"),
    ],
)
def test_faulty_regions_are_refused(changes, message):
    start = re.escape("regions[1] (image_id cat.jpg), region 1: ")
    with pytest.raises(ValueError, match=start + ".*" + re.escape(message)):
        pad_regions([one_region(), {**two_regions(), **changes}], 3)


def test_errors_without_image_id_name_the_index():
    with pytest.raises(ValueError, match=re.escape("regions[1], region 0: expected finite features")):
        pad_regions([two_regions(), {**one_region(), "features": [[NAN, 0, 0]]}], 3)


@pytest.mark.parametrize("key", ["features", "boxes", "width", "height"])
def test_missing_keys_are_named(key):
    item = two_regions()
    del item[key]
    with pytest.raises(ValueError, match=re.escape("regions[1] (image_id cat.jpg): ") + f".*: {key} missing"):
        pad_regions([one_region(), item], 3)


def test_batches_without_regions_are_refused():
    with pytest.raises(ValueError, match="at least one image, got an empty batch"):
        pad_regions([], 3)
    with pytest.raises(ValueError, match=re.escape("regions[1]: expected a dict") + ".*got ndarray"):
        pad_regions([one_region(), np.zeros((2, 3))], 3)
    for max_regions in (0, -1):
        with pytest.raises(ValueError, match=f"`max_regions`: expected at least 1 or None, got {max_regions}"):
            pad_regions([one_region()], 3, max_regions=max_regions)


# Processor


def test_text_only(processor):
    inputs = processor(text=["a dog runs", "the cat"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 8, 9, 3], [2, 11, 7, 3, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0] * 6] * 2
    assert all(tensor.dtype == torch.int64 for tensor in inputs.values())


def test_regions_only(processor):
    inputs = processor(regions=[one_region(), two_regions()], return_tensors="pt")
    assert set(inputs) == set(PADDED)
    assert all(isinstance(tensor, torch.Tensor) for tensor in inputs.values())
    assert_padded(inputs)


def test_text_and_regions(processor):
    inputs = processor(text=("a dog", "the cat runs"), regions=(one_region(), two_regions()), return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names)
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0], [2, 11, 7, 8, 9, 3]]
    assert_padded(inputs)
    half = inputs.to(torch.bfloat16)
    assert (half["region_features"].dtype, half["input_ids"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_single_items_get_a_batch_axis(processor, return_tensors):
    inputs = processor(text="a dog", regions=one_region(), return_tensors=return_tensors)
    kind = {"pt": torch.Tensor, "np": np.ndarray, None: list}[return_tensors]
    assert isinstance(inputs["input_ids"], kind)
    assert np.asarray(inputs["input_ids"]).tolist() == [[2, 5, 6, 3]]
    # A list of floats for each feature is never built.
    assert isinstance(inputs["region_features"], torch.Tensor if return_tensors == "pt" else np.ndarray)
    assert inputs["region_features"].tolist() == [[[1, 2, 3]]]
    assert inputs["region_attention_mask"].tolist() == [[1]]


def test_text_pairs(processor):
    inputs = processor(text=["a dog", "cat"], text_pair=["the mat", "a"], return_tensors="np")
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 3, 11, 12, 3], [2, 7, 3, 5, 3, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    # The longer text is shortened first: 3 + 1 tokens and 3 special ones become 2 + 1 and 3.
    inputs = processor(text="a dog on", text_pair="mat", max_length=6, return_tensors="np")
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 3, 12, 3]]


def test_truncation_and_padding_options(processor):
    assert processor(text="a dog on the mat", max_length=4)["input_ids"] == [[2, 5, 6, 3]]
    assert processor(text="a", padding="max_length", max_length=5)["input_ids"] == [[2, 5, 3, 0, 0]]
    assert processor(text=["a", "a dog"], padding=False)["input_ids"] == [[2, 5, 3], [2, 5, 6, 3]]
    assert processor(text="a", pad_to_multiple_of=4)["input_ids"] == [[2, 5, 3, 0]]
    assert processor(text="a", return_special_tokens_mask=True)["special_tokens_mask"] == [[1, 0, 1]]


def test_default_length_limit(processor):
    # A tokenizer that was built from a vocabulary knows no limit, so that BERT's 512 positions hold.
    assert len(processor(text="a " * 600)["input_ids"][0]) == 512
    assert len(processor(text="a", padding="max_length")["input_ids"][0]) == 512
    processor.tokenizer.model_max_length = 7
    assert len(processor(text="a " * 600)["input_ids"][0]) == 7
    processor.tokenizer.model_max_length = 1000
    assert len(processor(text="a " * 600)["input_ids"][0]) == 512
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(processor(text="a " * 600, truncation=False)["input_ids"][0]) == 602


def test_token_types_do_not_depend_on_the_tokenizer(processor):
    processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert processor(text="a", text_pair="dog")["token_type_ids"] == [[0, 0, 0, 1, 1]]
    assert "token_type_ids" not in processor(text="a", return_token_type_ids=False)


def test_max_regions_of_the_processor(tokenizer):
    inputs = InterBERTProcessor(tokenizer, 3, max_regions=1)(regions=two_regions())
    assert inputs["region_features"].tolist() == [[[4, 5, 6]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Expected `text`, `regions` or both, got neither"),
        ({"text_pair": "a", "regions": one_region()}, "got `text_pair` alone"),
        ({"text": "a", "regions": [one_region()] * 2}, "got 1 texts and 2 items of `regions`"),
        ({"text": ["a", "dog"], "regions": one_region()}, "got 2 texts and 1 items of `regions`"),
        ({"text": ["a", "dog"], "text_pair": "cat"}, "got 2 of `text` and 1 of `text_pair`"),
        ({"text": []}, "`text`: expected at least one string, got an empty list"),
        ({"text": ["a", None]}, "`text[1]`: expected a string, got NoneType"),
        ({"text": ["a"], "text_pair": [3]}, "`text_pair[0]`: expected a string, got int"),
        ({"text": 3}, "`text`: expected a string or a list of strings, got int"),
        ({"text": "a", "region": one_region()}, "arguments of the processor or of its tokenizer, got region."),
        ({"regions": one_region(), "max_regions": 1}, "or of its tokenizer, got max_regions."),
        ({"text": "a", "max_length": 2}, "`max_length`: expected more than the 2 special tokens, got 2."),
        ({"text": "a", "text_pair": "dog", "max_length": 3}, "more than the 3 special tokens, got 3."),
        ({"text": "a", "padding_side": "left"}, "expected `padding_side` 'right', got 'left'."),
        ({"regions": []}, "`regions`: expected at least one image"),
        ({"regions": np.zeros((1, 3))}, "`regions`: expected a dict or a list of dicts, got ndarray"),
        ({"regions": [one_region(), {**one_region(), "width": 0}]}, "regions[1]: expected a width > 0"),
    ],
)
def test_faulty_calls_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor(**arguments, return_tensors="pt")


def test_a_tokenizer_that_pads_on_the_left_is_refused(processor):
    """The poolers would read the padding."""
    processor.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="reads texts from position 0: expected `padding_side` 'right', got 'left'"):
        processor(text=["a", "a dog"])


def test_faulty_settings_are_refused(tokenizer):
    with pytest.raises(ValueError, match="`region_feature_size`: expected at least 1, got 0"):
        InterBERTProcessor(tokenizer, region_feature_size=0)
    with pytest.raises(ValueError, match="`max_regions`: expected at least 1 or None, got 0"):
        InterBERTProcessor(tokenizer, max_regions=0)


def test_decoding(processor):
    ids = processor(text=["a dog runs", "the cat"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a dog runs", "the cat"]
    assert processor.decode(ids[1]) == "[CLS] the cat [SEP] [PAD] [PAD]"


# Attention

# Joint attention in per cent of two pairs, "dogs" on the image of one region, and "a" on the image of two. Positions:
# the whole image, two regions, four tokens. The rows of padding hold what no result may contain.
JUNK = [100] * 7
JOINT_ATTENTION = [
    [
        [10, 20, 0, 30, 5, 15, 20],  # whole image
        [40, 10, 0, 10, 10, 20, 10],  # region
        JUNK,
        [20, 20, 0, 20, 10, 10, 20],  # [CLS]
        [10, 50, 0, 0, 10, 20, 10],  # dog
        [30, 10, 0, 20, 20, 0, 20],  # ##s
        [0, 0, 0, 50, 25, 25, 0],  # [SEP]
    ],
    [
        [0, 0, 0, 0, 100, 0, 0],  # whole image
        [0, 0, 100, 0, 0, 0, 0],  # region 1
        [0, 0, 0, 100, 0, 0, 0],  # region 2
        [100, 0, 0, 0, 0, 0, 0],  # [CLS]
        [0, 25, 0, 0, 0, 75, 0],  # a
        [0, 0, 0, 0, 0, 100, 0],  # [SEP]
        JUNK,
    ],
]
# "dogs" receives the sum of "dog" and "##s", and pays their mean: (10 + 30) / 2, (50 + 10) / 2 to the image positions,
# and (0 + 20) / 2, (10 + 20 + 20 + 0) / 2, (10 + 20) / 2 to the words.
MERGED_ATTENTION = [
    {
        "image_to_image": [[10, 20], [40, 10]],
        "image_to_text": [[30, 20, 20], [10, 30, 10]],
        "text_to_image": [[20, 20], [20, 30], [0, 0]],
        "text_to_text": [[20, 20, 20], [10, 25, 15], [50, 50, 0]],
    },
    {
        "image_to_image": [[0, 0, 0], [0, 0, 100], [0, 0, 0]],
        "image_to_text": [[0, 100, 0], [0, 0, 0], [100, 0, 0]],
        "text_to_image": [[100, 0, 0], [0, 25, 0], [0, 0, 0]],
        "text_to_text": [[0, 0, 0], [0, 0, 75], [0, 0, 100]],
    },
]


def recorded(attention, module="interaction"):
    """What a model returns: `attention` in per cent, of the shape (batch, positions, positions), as one layer of one
    head; or of the shape (layers, batch, heads, positions, positions)."""
    attention = torch.tensor(attention) / 100
    layers = attention[None, :, None] if attention.dim() == 3 else attention
    return SimpleNamespace(**{f"{module}_attentions": tuple(layers)})


def assert_attention(result, expected):
    assert {name for name in result if "_to_" in name} == set(expected)
    for name, shares in expected.items():
        assert_close(result[name], torch.tensor(shares) / 100, tolerance=1e-6)


def dogs_and_a(processor):
    return processor(text=["dogs", "a"], regions=[one_region(), two_regions()], return_tensors="pt")


def test_attention_is_mapped_to_words_and_boxes(processor):
    inputs = dogs_and_a(processor)
    assert inputs["input_ids"].tolist() == [[2, 6, 9, 3], [2, 5, 3, 0]]  # [CLS] dog ##s [SEP], [CLS] a [SEP] [PAD]
    first, second = processor.post_process_attention(recorded(JOINT_ATTENTION), inputs)
    assert first["words"] == ["[CLS]", "dogs", "[SEP]"]
    assert second["words"] == ["[CLS]", "a", "[SEP]"]
    assert_close(first["boxes"], torch.tensor([[0, 0, 1, 1], [0.1, 0.1, 0.5, 0.5]]))
    assert_close(second["boxes"], torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0.1, 0.5, 0.5, 0.75]]))
    assert_attention(first, MERGED_ATTENTION[0])
    assert_attention(second, MERGED_ATTENTION[1])
    assert first["text_to_image"].dtype == first["boxes"].dtype == torch.float32


def test_attention_of_the_streams(processor):
    """The text stream has the text's positions alone, the vision stream those of the image."""
    inputs = dogs_and_a(processor)
    text = [[row[3:] for row in pair[3:]] for pair in JOINT_ATTENTION]
    image = [[row[:3] for row in pair[:3]] for pair in JOINT_ATTENTION]
    for name, attention in (("text", text), ("image", image)):
        results = processor.post_process_attention(recorded(attention, name), inputs, module=name)
        for result, expected in zip(results, MERGED_ATTENTION, strict=True):
            assert_attention(result, {f"{name}_to_{name}": expected[f"{name}_to_{name}"]})
            assert len(result["words"]) == 3
        assert [len(result["boxes"]) for result in results] == [2, 3]


def test_attention_of_one_modality(processor):
    text = [[row[3:] for row in JOINT_ATTENTION[0][3:]]]
    (result,) = processor.post_process_attention(recorded(text), processor(text="dogs", return_tensors="pt"))
    assert result.pop("words") == ["[CLS]", "dogs", "[SEP]"]
    assert_attention(result, {"text_to_text": MERGED_ATTENTION[0]["text_to_text"]})
    assert set(result) == {"text_to_text"}

    image = [[row[:3] for row in JOINT_ATTENTION[1][:3]]]
    (result,) = processor.post_process_attention(recorded(image), processor(regions=two_regions(), return_tensors="pt"))
    assert result.pop("boxes").shape == (3, 4)
    assert_attention(result, {"image_to_image": MERGED_ATTENTION[1]["image_to_image"]})
    assert set(result) == {"image_to_image"}


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_attention_without_masks(processor, return_tensors):
    """Then nothing is padding."""
    inputs = processor(text="dogs", regions=two_regions(), return_tensors=return_tensors)
    del inputs["attention_mask"], inputs["region_attention_mask"]
    (result,) = processor.post_process_attention(recorded(JOINT_ATTENTION[1:]), inputs)
    assert result["words"] == ["[CLS]", "dogs", "[SEP]"]
    assert_close(result["boxes"], torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0.1, 0.5, 0.5, 0.75]]))
    # [CLS], then the mean of two rows, then what is padding elsewhere.
    assert_close(result["text_to_image"], torch.tensor([[1, 0, 0], [0, 0.125, 0], [1, 1, 1]]))
    assert_close(result["text_to_text"], torch.tensor([[0, 0, 0], [0, 0.875, 0], [1, 2, 1]]))


def test_attention_of_one_text_beside_two_images(processor):
    inputs = processor(text="dogs", return_tensors="pt")
    inputs.update(processor(regions=[one_region(), two_regions()], return_tensors="pt"))
    sizes = torch.tensor([[100, 200], [40, 10]])
    first, second = processor.post_process_attention(recorded(JOINT_ATTENTION), inputs, target_sizes=sizes)
    assert first["words"] == second["words"] == ["[CLS]", "dogs", "[SEP]"]
    assert_close(first["boxes"], torch.tensor([[0.0, 0, 200, 100], [20, 10, 100, 50]]))
    assert_close(second["boxes"], torch.tensor([[0.0, 0, 10, 40], [0, 0, 10, 40], [1, 20, 5, 30]]))
    assert_attention(first, MERGED_ATTENTION[0])
    assert_close(second["text_to_image"], torch.tensor([[1, 0, 0], [0, 0.125, 0], [1, 1, 1]]))


@pytest.mark.parametrize("target_sizes", [[(40, 10)], [(40, 10), (40, 10)]])
def test_attention_of_two_texts_beside_one_image(processor, target_sizes):
    inputs = processor(text=["dogs", "a"], return_tensors="pt")
    inputs.update(processor(regions=two_regions(), return_tensors="pt"))
    first, second = processor.post_process_attention(recorded(JOINT_ATTENTION), inputs, target_sizes=target_sizes)
    for result in (first, second):
        assert_close(result["boxes"], torch.tensor([[0.0, 0, 10, 40], [0, 0, 10, 40], [1, 20, 5, 30]]))
    assert (first["words"][1], second["words"][1]) == ("dogs", "a")
    assert_close(first["text_to_image"], torch.tensor([[0.2, 0.2, 0], [0.2, 0.3, 0], [0, 0, 0]]))
    assert_attention(second, MERGED_ATTENTION[1])


# All attention of layer 0 goes to position 0 in head 0, to 1 in head 1; that of layer 1 to position 2, and to 0.
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"layer": 0, "head": 0}, [100, 0, 0]),
        ({"layer": 0, "head": 1}, [0, 100, 0]),
        ({"layer": -2, "head": -1}, [0, 100, 0]),
        ({"layer": 1, "head": 0}, [0, 0, 100]),
        ({"layer": 1}, [50, 0, 50]),
        ({"head": 0}, [0, 0, 100]),
        ({}, [50, 0, 50]),
        ({"layer": None, "head": 0}, [50, 0, 50]),
        ({"layer": None, "head": 1}, [50, 50, 0]),
        ({"layer": None}, [50, 25, 25]),
    ],
)
def test_layers_and_heads(processor, arguments, expected):
    to_0, to_1, to_2 = [[100, 0, 0]] * 3, [[0, 100, 0]] * 3, [[0, 0, 100]] * 3
    outputs = recorded([[[to_0, to_1]], [[to_2, to_0]]], "text")
    inputs = processor(text="a", return_tensors="pt")
    (result,) = processor.post_process_attention(outputs, inputs, module="text", **arguments)
    assert_attention(result, {"text_to_text": [expected] * 3})


@pytest.mark.parametrize(
    ("input_ids", "words"),
    [
        ([2, 8, 9, 9, 6, 9, 3], ["[CLS]", "runss", "dogs", "[SEP]"]),
        ([2, 4, 9, 3], ["[CLS]", "[MASK]", "##s", "[SEP]"]),
        ([2, 1, 9, 9, 1, 3], ["[CLS]", "[UNK]", "##ss", "[UNK]", "[SEP]"]),
        ([9, 5], ["##s", "a"]),
    ],
)
def test_special_tokens_stay_words_of_their_own(processor, input_ids, words):
    uniform = torch.full((1, len(input_ids), len(input_ids)), 100 / len(input_ids)).tolist()
    inputs = {"input_ids": torch.tensor([input_ids])}
    (result,) = processor.post_process_attention(recorded(uniform, "text"), inputs, module="text")
    assert result["words"] == words
    assert_close(result["text_to_text"].sum(dim=1), torch.ones(len(words)))


@pytest.mark.parametrize("module", ["interaction", "text", "image"])
def test_attention_of_a_model(processor, module):
    """Rows sum to 1 without padding, so what was left out is padding; and a pair alone has the same attention."""
    model = tiny_model(InterBERTModel, region_feature_size=3)
    texts, regions = ["a dog runs on the mat", "cat runs"], [one_region(), two_regions()]
    inputs = processor(text=texts, regions=regions, return_tensors="pt")
    outputs = model(**inputs, output_attentions=True)
    results = processor.post_process_attention(outputs, inputs, module=module, layer=None)
    for result, text, item in zip(results, texts, regions, strict=True):
        assert result["words"] == ["[CLS]", *text.split(), "[SEP]"]
        for source in ("text", "image") if module == "interaction" else (module,):
            blocks = [block for name, block in result.items() if name.startswith(f"{source}_to_")]
            assert len(blocks) == (2 if module == "interaction" else 1)
            assert_close(sum(block.sum(dim=1) for block in blocks), torch.ones(len(blocks[0])))
        alone = processor(text=text, regions=item, return_tensors="pt")
        outputs = model(**alone, output_attentions=True)
        (expected,) = processor.post_process_attention(outputs, alone, module=module, layer=None)
        assert expected.pop("words") == result.pop("words")
        for name, block in expected.items():
            assert_close(result[name], block)
            assert not block.requires_grad


def test_attention_without_a_layer_is_refused(processor):
    """Attentions that were not recorded, and those of a modality that was not given or of a stream without layers."""
    inputs = processor(text="a", return_tensors="pt")
    model = tiny_model(InterBERTModel, region_feature_size=3)
    with pytest.raises(ValueError, match="expected `text_attentions` of at least one layer.*got None"):
        processor.post_process_attention(model(**inputs), inputs, module="text")
    outputs = model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="expected `image_attentions` of at least one layer"):
        processor.post_process_attention(outputs, inputs, module="image")
    without_stream = tiny_model(InterBERTModel, region_feature_size=3, num_text_layers=0)
    with pytest.raises(ValueError, match="expected `text_attentions` of at least one layer"):
        processor.post_process_attention(without_stream(**inputs, output_attentions=True), inputs, module="text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": "vision"}, "`module`: expected one of ('interaction', 'text', 'image'), got 'vision'"),
        ({"layer": 1}, "`layer`: expected None or an index from -1 to 0 of the interaction module, got 1"),
        ({"layer": -2}, "`layer`: expected None or an index from -1 to 0 of the interaction module, got -2"),
        ({"head": 1}, "`head`: expected None or an index from -1 to 0 of the interaction module, got 1"),
        ({"head": -2, "layer": None}, "`head`: expected None or an index from -1 to 0"),
        ({"target_sizes": [(100, 200)]}, "`target_sizes`: expected one (height, width) for each image, shape (2, 2)"),
        ({"target_sizes": torch.ones(3, 2)}, "shape (2, 2), got shape (3, 2)"),
        ({"target_sizes": (100, 200)}, "shape (2, 2), got shape (2,)"),
    ],
)
def test_faulty_attention_arguments_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor.post_process_attention(recorded(JOINT_ATTENTION), dogs_and_a(processor), **arguments)


@pytest.mark.parametrize(
    ("text", "regions", "message"),
    [
        (
            ["dogs"] * 3,
            [two_regions()] * 3,
            "shape (3, heads, 7, 7) for 3 texts of 4 tokens and 3 images of 3 positions",
        ),
        (["dogs"], [two_regions()], "(1, heads, 7, 7) for 1 texts of 4 tokens and 1 images of 3 positions"),
        (["a", "dog"], [two_regions()] * 2, "shape (2, heads, 6, 6) for 2 texts of 3 tokens"),
        (
            ["dogs"] * 2,
            [one_region()] * 2,
            "shape (2, heads, 6, 6) for 2 texts of 4 tokens and 2 images of 2 positions",
        ),
        (["dogs"] * 2, None, "shape (2, heads, 4, 4) for 2 texts of 4 tokens and 0 images"),
        (["dogs"] * 2, [two_regions()] * 3, "for 2 texts of 4 tokens and 3 images of 3 positions"),
    ],
)
def test_inputs_of_other_outputs_are_refused(processor, text, regions, message):
    inputs = processor(text=text, return_tensors="pt")
    if regions is not None:
        inputs.update(processor(regions=regions, return_tensors="pt"))
    with pytest.raises(ValueError, match="do not fit.*" + re.escape(message) + ".*" + re.escape("got (2, 1, 7, 7)")):
        processor.post_process_attention(recorded(JOINT_ATTENTION), inputs)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("input_ids", (2, 4, 3), "`input_ids` and `attention_mask`: expected 2 dimensions"),
        ("attention_mask", (2, 3), "got the shapes (2, 4) and (2, 3)"),
        ("attention_mask", (1, 4), "got the shapes (2, 4) and (1, 4)"),
        ("region_boxes", (2, 2), "`region_boxes` and `region_attention_mask`: expected 3 dimensions"),
        ("region_attention_mask", (2, 3), "got the shapes (2, 2, 4) and (2, 3)"),
    ],
)
def test_inputs_of_other_shapes_are_refused(processor, name, shape, message):
    inputs = dogs_and_a(processor)
    inputs[name] = torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=re.escape(message)):
        processor.post_process_attention(recorded(JOINT_ATTENTION), inputs)


def test_two_texts_beside_three_images_are_refused(processor):
    inputs = processor(text=["dogs"] * 2, return_tensors="pt")
    inputs.update(processor(regions=[two_regions()] * 3, return_tensors="pt"))
    with pytest.raises(ValueError, match="do not fit"):
        processor.post_process_attention(recorded([*JOINT_ATTENTION, JOINT_ATTENTION[0]]), inputs)


# Saving and loading


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_round_trip(tokenizer, tmp_path):
    arguments = {"region_feature_size": 3, "max_regions": 2, "region_detector": {"name_or_path": "org/detector"}}
    InterBERTProcessor(tokenizer, **arguments).save_pretrained(tmp_path / "saved")
    reloaded = InterBERTProcessor.from_pretrained(tmp_path / "saved")
    assert {name: getattr(reloaded, name) for name in arguments} == arguments
    assert reloaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "saved" / "processing_interbert.py").read_bytes() == PROCESSOR_FILE.read_bytes()
    assert read_json(tmp_path / "saved" / "processor_config.json") == {
        "auto_map": {"AutoProcessor": "processing_interbert.InterBERTProcessor"},
        "processor_class": "InterBERTProcessor",
        **arguments,
    }


def test_starting_from_a_bert_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "plain")
    arguments = {"region_feature_size": 3, "max_regions": 1, "region_detector": "org/detector"}
    processor = InterBERTProcessor.from_pretrained(tmp_path / "plain", **arguments)
    assert (processor.region_feature_size, processor.max_regions) == (3, 1)
    assert processor.region_detector == {"name_or_path": "org/detector"}
    processor.save_pretrained(tmp_path / "saved")
    assert not arguments.keys() & read_json(tmp_path / "saved" / "tokenizer_config.json").keys()
    changed = InterBERTProcessor.from_pretrained(tmp_path / "saved", max_regions=None)
    assert (changed.region_feature_size, changed.max_regions) == (3, None)


def test_use_leaves_no_trace_in_the_saved_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path / "fresh")
    processor(text=["a dog runs", "cat"], padding="max_length", max_length=4, return_tensors="pt")
    processor.save_pretrained(tmp_path / "used")
    state = read_json(tmp_path / "used" / "tokenizer.json")
    assert (state["padding"], state["truncation"]) == (None, None)
    assert (tmp_path / "used" / "tokenizer.json").read_bytes() == (tmp_path / "fresh" / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "used")("a dog runs")["input_ids"] == [2, 5, 6, 8, 9, 3]


def test_loading_does_not_ask_to_run_the_code_of_the_model(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path / "saved")
    config = {"model_type": "unknown", "auto_map": {"AutoConfig": "configuration_unknown.UnknownConfig"}}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))

    def refuse(*arguments):
        pytest.fail("loading the processor asked a question")

    monkeypatch.setattr("builtins.input", refuse)
    assert InterBERTProcessor.from_pretrained(tmp_path / "saved").region_feature_size == 3


REMOTE_SCRIPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"configuration_interbert", "modeling_interbert", "processing"}:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import processing
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is not blocked")

from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert (processor.region_feature_size, processor.max_regions) == (3, 1)
regions = {"features": [[1, 2, 3], [4, 5, 6]], "boxes": [[20, 10, 100, 50]] * 2, "width": 200, "height": 100}
inputs = processor(text="a dog", regions=regions, return_tensors="pt")
assert inputs["input_ids"].tolist() == [[2, 5, 6, 3]]
assert inputs["region_features"].tolist() == [[[1, 2, 3]]]
processor.save_pretrained(sys.argv[2])
"""


def test_remote_code_without_the_package(tokenizer, tmp_path):
    saved, saved_again = tmp_path / "saved", tmp_path / "saved_again"
    InterBERTProcessor(tokenizer, region_feature_size=3, max_regions=1).save_pretrained(saved)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update({"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    result = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE_SCRIPT, str(saved), str(saved_again)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert (saved_again / "processing_interbert.py").read_bytes() == PROCESSOR_FILE.read_bytes()
    assert read_json(saved_again / "processor_config.json") == read_json(saved / "processor_config.json")
    # The folder that was saved there opens here as well.
    assert InterBERTProcessor.from_pretrained(saved_again).max_regions == 1
