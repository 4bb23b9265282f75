"""Attention drawn as a user draws it, from a tiny model on a few generated scenes; and what the pictures show."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps, rcParams
from matplotlib.patches import Rectangle
from model_fixtures import perturb
from PIL import Image
from transformers import AutoTokenizer

import region_drawing
import visualize_attention
from configuration_interbert import InterBERTConfig
from generate_scenes import REGION_FEATURE_SIZE, write_scenes
from modeling_interbert import InterBERTForPreTraining
from pictures import Pictures
from processing import InterBERTProcessor, RegionDataset, load_region_dataset
from region_drawing import CANVAS
from visualize_attention import (
    AttentionArguments,
    choose_words,
    draw_image,
    draw_interaction,
    draw_text,
    find_row,
    first_caption,
    load_picture,
)

SCRIPT = str(Path(__file__).resolve().parent.parent / "examples" / "visualize_attention.py")

# Two words and two regions of an image of 100 x 50 pixels; shares of attention worked out for the eye.
ATTENTION = {
    "words": ["[CLS]", "red", "ring", "[SEP]"],
    "boxes": torch.tensor([[0.0, 0, 100, 50], [10, 20, 30, 40], [60, 20, 90, 45]]),
    "text_to_image": torch.tensor([[0.9, 0.0, 0.0], [0.05, 0.1, 0.2], [0.0, 0.4, 0.3], [0.0, 0.0, 0.0]]),
    "text_to_text": torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.0, 0, 0, 1]]),
    "image_to_image": torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=4, num_validation=4, num_test=2)
    return folder


@pytest.fixture(scope="module")
def regions(scenes) -> RegionDataset:
    return load_region_dataset(scenes, "validation")


@pytest.fixture(scope="module")
def model_dir(scenes, tmp_path_factory) -> Path:
    """A pretraining checkpoint with its processor. The modules differ in their numbers of layers."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    config = InterBERTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_text_layers=3,
        num_vision_layers=1,
        num_attention_heads=2,
        vision_num_attention_heads=2,
        intermediate_size=16,
        vision_intermediate_size=16,
        region_feature_size=REGION_FEATURE_SIZE,
        num_region_classes=48,
        pooler_size=8,
    )
    perturb(InterBERTForPreTraining(config)).save_pretrained(folder)
    InterBERTProcessor(tokenizer, region_feature_size=REGION_FEATURE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture
def draw(scenes, model_dir, tmp_path, monkeypatch):
    """Runs the script with further arguments; the picture that it writes."""

    def run(*arguments: str) -> Image.Image:
        output = tmp_path / "new" / "folder" / "attention.png"
        command = ["--model_name_or_path", str(model_dir), "--dataset_name", str(scenes), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *command, *arguments])
        visualize_attention.main()
        return Image.open(output)

    return run


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """Arguments of every call of `draw_interaction`, in the order of the calls."""
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return draw_interaction(*arguments)

    monkeypatch.setattr(visualize_attention, "draw_interaction", record)
    return calls


def outlines(ax) -> list[tuple[float, ...]]:
    """x1, y1, x2, y2 of the boxes of a panel."""
    boxes = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
    assert all(isinstance(patch, Rectangle) for patch in ax.patches)
    return [(*np.round([box.x0, min(box.y0, box.y1), box.x1, max(box.y0, box.y1)], 3).tolist(),) for box in boxes]


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def tick_labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# The script


def test_script(scenes, model_dir, tmp_path):
    output = tmp_path / "attention.png"
    command = [sys.executable, SCRIPT, "--model_name_or_path", str(model_dir), "--dataset_name", str(scenes)]
    result = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.startswith("Image validation-000000, “") and str(output) in result.stdout
    picture = Image.open(output)
    assert picture.format == "PNG"
    assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_the_first_caption_of_the_first_row_is_drawn(draw, drawn, regions):
    draw()
    ((attention, rows, picture, top_k, title),) = drawn
    caption = regions.captions(0)[0]
    assert " ".join(attention["words"][row] for row in rows) == caption.replace(",", " ,")
    assert title == f"{caption}\ninteraction module, mean over layers, mean over heads; attention in %"
    assert (picture.size, top_k) == ((128, 128), 3)
    np.testing.assert_allclose(attention["boxes"][1:], regions[0]["boxes"], atol=1e-4)


def test_image_caption_words_layer_and_head_are_chosen(draw, drawn, regions):
    image_id = regions[2]["image_id"]
    caption = "$5^$ for a red ring"  # faulty mathematics
    size = draw("--image_id", image_id, "--caption", caption, "--words", "$", "ring").size
    for head in ("0", "1"):
        draw("--image_id", image_id, "--caption", caption, "--words", "ring", "--layer", "-1", "--head", head)
    (mean, rows, *_), (first_head, *_), (last, last_rows, *_, title) = drawn
    assert [mean["words"][row] for row in rows] == ["$", "$", "ring"]
    assert [last["words"][row] for row in last_rows] == ["ring"]
    assert title == f"{caption}\ninteraction module, layer -1, head 1; attention in %"
    np.testing.assert_allclose(last["boxes"][1:], regions[2]["boxes"], atol=1e-4)
    for other in (mean, first_head):
        assert not torch.allclose(other["text_to_image"], last["text_to_image"])
    assert size[0] > 4 * 2.5 * 150  # four panels of 2.5 inches, with 150 dots each


def test_words_among_words_and_regions_among_regions(draw, regions):
    """Each heat map has the shape of its stream, so that the picture grows with the number of words, or does not."""
    short, long = ("--caption", "a ring"), ("--caption", "a ring and a ring and a ring and a ring and a ring")
    assert draw("--module", "text", *long).height > draw("--module", "text", *short).height
    assert draw("--module", "image", *long).size == draw("--module", "image", *short).size
    draw("--module", "text", "--layer", "2")
    with pytest.raises(ValueError, match="from -1 to 0 of the image module, got 2"):
        draw("--module", "image", "--layer", "2")


def test_faulty_choices_are_refused(draw):
    with pytest.raises(ValueError, match="`--image_id` must be one of the 4 of the split, such as validation-000000, "):
        draw("--image_id", "test-000000")
    with pytest.raises(ValueError, match=r"words of the caption, \[CLS\] a red ring \[SEP\]; got blue star"):
        draw("--caption", "a red ring", "--words", "red", "blue", "star")
    with pytest.raises(ValueError, match="`--top_k` must be at least 1, got 0"):
        AttentionArguments(top_k=0)
    with pytest.raises(ValueError, match="`--words` is for the modules interaction and text"):
        AttentionArguments(module="image", words=["ring"])


def test_chinese_fonts_are_used_where_they_are_installed(draw, monkeypatch):
    monkeypatch.setattr(region_drawing.font_manager, "get_font_names", lambda: ["DejaVu Sans", "SimHei", "Times"])
    draw("--caption", "a ring", "--words", "ring")
    assert rcParams["font.family"] == ["DejaVu Sans", "SimHei"]


# What it reads


def test_find_row(regions):
    assert find_row(regions, None) == 0
    assert [find_row(regions, f"validation-00000{i}") for i in (0, 3)] == [0, 3]
    reversed_rows = RegionDataset(regions.dataset.select([3, 2, 1]))
    assert find_row(reversed_rows, "validation-000001") == 2
    with pytest.raises(ValueError, match="one of the 3 of the split, such as validation-000003.*got validation-000000"):
        find_row(reversed_rows, "validation-000000")


def test_an_image_without_captions_needs_one(regions):
    assert first_caption(regions, 1, "captions_zh") == regions.dataset[1]["captions_zh"][0]
    rows = regions.dataset.map(lambda row: {"captions": []}, features=regions.dataset.features)
    with pytest.raises(ValueError, match="Image validation-000001 has no caption: give one with `--caption`"):
        first_caption(RegionDataset(rows), 1, "captions")


def test_pictures(regions, tmp_path):
    """From the dataset, from a folder, or a blank canvas of the image's size."""
    expected = np.asarray(regions.dataset[1]["image"].convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_picture(Pictures(regions), 1)), expected)

    without_pictures = RegionDataset(regions.dataset.remove_columns("image"))
    nothing = regions.dataset.map(lambda row: {"image": None}, features=regions.dataset.features)
    for dataset in (without_pictures, RegionDataset(nothing)):
        canvas = load_picture(Pictures(dataset), 1)
        assert (canvas.size, canvas.mode) == ((128, 128), "RGB")
        assert canvas.getcolors() == [(128 * 128, tuple(bytes.fromhex(CANVAS[1:])))]

    Image.new("RGB", (30, 20), "red").save(tmp_path / "validation-000001.png")
    for dataset in (regions, without_pictures):
        assert load_picture(Pictures(dataset, str(tmp_path)), 1).size == (30, 20)


def test_choose_words(scenes):
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    words = ["[CLS]", "a", "ring", "[UNK]", "a", "[SEP]"]
    assert choose_words(words, None, tokenizer) == [1, 2, 3, 4]
    assert choose_words(words, ["a", "[CLS]"], tokenizer) == [0, 1, 4]
    with pytest.raises(ValueError, match=r"\[CLS\] a ring \[UNK\] a \[SEP\]; got the"):
        choose_words(words, ["ring", "the"], tokenizer)


# What it draws


def test_a_panel_for_each_word():
    picture = Image.new("RGB", (100, 50))
    figure = draw_interaction(ATTENTION, [1, 2], picture, top_k=1, title="a title")
    legend, red, ring, heat_map = figure.axes
    # "red" looks at region 2 most, "ring" at region 1, where the most attention of all goes.
    assert outlines(legend) == [(10, 20, 30, 40), (60, 20, 90, 45)]
    assert texts(legend) == ["1", "2"]
    assert outlines(red) == [(60, 20, 90, 45)] and texts(red) == ["20.0"]
    assert outlines(ring) == [(10, 20, 30, 40)] and texts(ring) == ["40.0"]
    assert (red.get_title("left"), red.get_title("right")) == ("red", "whole image 5.0")
    assert (ring.get_title("left"), ring.get_title("right")) == ("ring", "whole image 0.0")
    assert red.patches[0].get_edgecolor() == pytest.approx(colormaps["viridis"](0.5))
    assert ring.patches[0].get_edgecolor() == pytest.approx(colormaps["viridis"](1.0))
    assert tick_labels(heat_map.yaxis) == ["red", "ring"]
    assert tick_labels(heat_map.xaxis) == ["whole\nimage", "1", "2"]
    assert texts(heat_map) == ["5.0", "10.0", "20.0", "0.0", "40.0", "30.0"]
    assert [text.get_text() for text in figure.texts] == ["a title"]


def test_top_k_is_what_is_drawn():
    picture = Image.new("RGB", (100, 50))
    legend, ring, heat_map = draw_interaction(ATTENTION, [2], picture, top_k=1, title="").axes
    assert texts(legend) == ["1"] and texts(heat_map) == ["0.0", "40.0"]
    legend, red, heat_map = draw_interaction(ATTENTION, [1], picture, top_k=9, title="").axes
    assert texts(red) == ["20.0", "10.0"] and texts(heat_map) == ["5.0", "10.0", "20.0"]


def test_pictures_keep_their_proportions():
    figure = draw_interaction(ATTENTION, [1, 2], Image.new("RGB", (100, 50)), top_k=1, title="")
    inches = figure.get_size_inches()
    for ax in figure.axes[:3]:
        width, height = inches * (ax.get_position().width, ax.get_position().height)
        assert (width, height) == pytest.approx((2.5, 1.25))
    boxes = [ax.get_position() for ax in figure.axes]
    assert all(0 <= box.x0 and box.x1 <= 1 and 0 <= box.y0 and box.y1 <= 1 for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_heat_maps_of_the_streams():
    (heat_map,) = draw_text(ATTENTION, [2], title="").axes
    assert tick_labels(heat_map.yaxis) == ["ring"]
    assert tick_labels(heat_map.xaxis) == ["[CLS]", "red", "ring", "[SEP]"]
    assert texts(heat_map) == ["70.0", "10.0", "10.0", "10.0"]

    legend, heat_map = draw_image(ATTENTION, Image.new("RGB", (100, 50)), title="").axes
    assert outlines(legend) == [(10, 20, 30, 40), (60, 20, 90, 45)]
    assert tick_labels(heat_map.yaxis) == ["whole image", "1", "2"]
    assert texts(heat_map) == ["50.0", "25.0", "25.0", "10.0", "20.0", "70.0", "30.0", "30.0", "40.0"]
