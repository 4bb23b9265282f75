#!/usr/bin/env python
"""
Draws which regions of an image the words of a caption look at: the attention of an InterBERT, mapped back to words and
boxes. On a CPU, with what `python examples/quickstart.py` leaves behind:

    python examples/visualize_attention.py --model_name_or_path outputs/quickstart/model \\
        --dataset_name outputs/quickstart/scenes --split test --output outputs/attention.png

Some words of a caption of your own, in one head of the last layer:

    python examples/visualize_attention.py --model_name_or_path outputs/quickstart/model \\
        --dataset_name outputs/quickstart/scenes --split test --caption "a ring next to a cross" --words ring cross \\
        --layer -1 --head 0 --output outputs/attention_head_0.png

Region datasets without pictures are drawn on a blank canvas, or on the pictures of a folder:

    python examples/visualize_attention.py --model_name_or_path org/interbert --dataset_name org/my-regions \\
        --image_id 1000092795 --image_dir flickr30k_images

Words look at regions in the interaction module alone. `--module text` shows what words look at among themselves in the
text stream, `--module image` the same of regions in the vision stream.
"""

import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from modeling_interbert import InterBERTModel
from pictures import Pictures
from processing import InterBERTProcessor, RegionDataset, load_region_dataset
from region_drawing import CANVAS, FONT_SIZE, draw_boxes, set_fonts, text_colour, text_width

COLOURS = colormaps["viridis"]  # dark: little attention, bright: much
PANEL_WIDTH, TITLE_HEIGHT, GAP = 2.5, 0.35, 0.15  # inches
CELL_WIDTH, CELL_HEIGHT = 0.42, 0.27  # inches, of the heat map
PANELS_PER_ROW = 5


@dataclass
class PairArguments:
    """The caption, the image, and the model that reads them."""

    model_name_or_path: str = field(metadata={"help": "InterBERT checkpoint with its processor."})
    dataset_name: str = field(metadata={"help": "Region dataset: a local folder or a Hub name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="validation", metadata={"help": "Split that has the image."})
    image_id: str | None = field(default=None, metadata={"help": "`image_id` of the row; by default the first row."})
    caption: str | None = field(default=None, metadata={"help": "By default the first caption of the row."})
    caption_column: str = field(default="captions", metadata={"help": "Column of captions."})
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures that are named by their `image_id`. By default the picture is that of the "
            "dataset's column `image`; where there is none, the boxes are drawn on a blank canvas."
        },
    )


@dataclass
class AttentionArguments:
    """Which attention is drawn."""

    module: str = field(
        default="interaction",
        metadata={
            "help": "Attention of words to regions (interaction), or within one stream: of words to words (text), of "
            "regions to regions (image).",
            "choices": ["interaction", "text", "image"],
        },
    )
    layer: int | None = field(
        default=None, metadata={"help": "Layer of the module, -1 for its last; by default the mean over all layers."}
    )
    head: int | None = field(default=None, metadata={"help": "Attention head; by default the mean over all heads."})
    words: list[str] | None = field(
        default=None,
        metadata={"help": "Words whose attention is drawn; by default all words of the caption but [CLS] and [SEP]."},
    )
    top_k: int = field(default=3, metadata={"help": "For each word, the so many regions it looks at most are drawn."})
    output: str = field(default="attention.png", metadata={"help": "File to write; the extension names the format."})

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"`--top_k` must be at least 1, got {self.top_k}.")
        if self.module == "image" and self.words is not None:
            raise ValueError("`--words` is for the modules interaction and text: the vision stream has no words.")

    def describe(self) -> str:
        layer = "mean over layers" if self.layer is None else f"layer {self.layer}"
        head = "mean over heads" if self.head is None else f"head {self.head}"
        return f"{self.module} module, {layer}, {head}; attention in %"


def find_row(regions: RegionDataset, image_id: str | None) -> int:
    """The row of an image; the first one if no image is named."""
    if image_id is None:
        return 0
    image_ids = regions.image_ids
    if image_id not in image_ids:
        raise ValueError(
            f"`--image_id` must be one of the {len(image_ids):,} of the split, such as {', '.join(image_ids[:3])}; got "
            f"{image_id}."
        )
    return image_ids.index(image_id)


def first_caption(regions: RegionDataset, row: int, column: str) -> str:
    captions = regions.captions(row, column)
    if not captions:
        raise ValueError(f"Image {regions[row]['image_id']} has no caption: give one with `--caption`.")
    return captions[0]


def load_picture(pictures: Pictures, row: int) -> Image.Image:
    """The picture of a row in RGB, or a blank canvas of its size."""
    record = pictures.regions[row]
    return pictures.open(row) or Image.new("RGB", (record["width"], record["height"]), CANVAS)


def choose_words(words: list[str], chosen: list[str] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Indices of the chosen words, wherever they occur; by default of all but [CLS] and [SEP]."""
    if chosen is None:
        return [i for i, word in enumerate(words) if word not in (tokenizer.cls_token, tokenizer.sep_token)]
    missing = [word for word in chosen if word not in words]
    if missing:
        raise ValueError(f"`--words` must be words of the caption, {' '.join(words)}; got {' '.join(missing)}.")
    return [i for i, word in enumerate(words) if word in chosen]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def draw_numbered_regions(ax: Axes, picture: Image.Image, boxes: np.ndarray, names: list[str]):
    """Every region in a colour of its own, with its name. `boxes` as in [`draw_boxes`]."""
    draw_boxes(ax, picture, boxes, [colormaps["tab20"](i % 20) for i in range(len(boxes))], names)
    ax.set_title("regions", loc="left", fontsize=FONT_SIZE + 2)


def draw_heat_map(ax: Axes, weights: np.ndarray, row_names: list[str], column_names: list[str], rotation: int = 0):
    """A table of the shares of attention that rows pay to columns, in per cent; the brightest cell is the largest."""
    scale = Normalize(0, weights.max())
    ax.imshow(weights, cmap=COLOURS, norm=scale, aspect="auto")
    ax.set_xticks(range(len(column_names)), column_names, rotation=rotation)
    ax.set_yticks(range(len(row_names)), row_names)
    ax.tick_params(length=0, labelsize=FONT_SIZE)
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)
    for row, column in np.ndindex(weights.shape):
        colour = text_colour(COLOURS(scale(weights[row, column])))
        text = percent(weights[row, column])
        ax.text(column, row, text, color=colour, fontsize=FONT_SIZE, ha="center", va="center_baseline")


def make_figure(
    title: str, num_panels: int, panel_height: float, cells: tuple[int, int], label_size: tuple[float, float]
) -> tuple[Figure, list[Axes], Axes]:
    """
    A figure with a title, rows of pictures, and a heat map below them.

    Args:
        title: wrapped to the width of the figure.
        panel_height: of every picture, in inches.
        cells: rows and columns of the heat map.
        label_size: width of the heat map's labels on the left and height of those above it, in inches.

    Returns:
        The figure, the axes of each picture, and those of the heat map.
    """
    columns = max(1, min(num_panels, PANELS_PER_ROW))
    map_width, map_height = cells[1] * CELL_WIDTH, cells[0] * CELL_HEIGHT
    width = max(columns * (PANEL_WIDTH + GAP), label_size[0] + map_width + GAP, 2 * PANEL_WIDTH) + GAP
    lines = [line for paragraph in title.split("\n") for line in textwrap.wrap(paragraph, int(12 * width))]
    panels_top = 0.2 * len(lines) + GAP
    map_top = panels_top + math.ceil(num_panels / columns) * (TITLE_HEIGHT + panel_height) + GAP + label_size[1]
    height = map_top + map_height + GAP
    figure = Figure((width, height))

    def add_axes(left: float, top: float, axes_width: float, axes_height: float) -> Axes:
        """Axes at so many inches from the upper left corner."""
        bottom = height - top - axes_height
        return figure.add_axes((left / width, bottom / height, axes_width / width, axes_height / height))

    figure.text(GAP / width, 1 - GAP / height, "\n".join(lines), va="top", fontsize=FONT_SIZE + 2)
    panels = []
    for panel in range(num_panels):
        row, column = divmod(panel, columns)
        top = panels_top + row * (TITLE_HEIGHT + panel_height) + TITLE_HEIGHT
        panels.append(add_axes(GAP + column * (PANEL_WIDTH + GAP), top, PANEL_WIDTH, panel_height))
    return figure, panels, add_axes(GAP + label_size[0], map_top, map_width, map_height)


def draw_interaction(attention: dict, rows: list[int], picture: Image.Image, top_k: int, title: str) -> Figure:
    """A picture for each word with the regions that it looks at most, and its attention to all that are drawn."""
    weights = attention["text_to_image"][rows].numpy()  # (words, regions + 1)
    boxes = attention["boxes"].numpy()
    words = [attention["words"][row] for row in rows]
    top_regions = 1 + np.argsort(-weights[:, 1:], axis=1)[:, :top_k]  # (words, top_k)
    drawn = np.unique(top_regions)
    names = [str(region) for region in drawn]

    panel_height = PANEL_WIDTH * picture.height / picture.width
    label_size = (text_width(max(words, key=len)), TITLE_HEIGHT)
    cells = (len(words), 1 + len(drawn))
    figure, panels, heat_map = make_figure(title, 1 + len(words), panel_height, cells, label_size)
    draw_numbered_regions(panels[0], picture, boxes[drawn], names)
    largest = weights.max()
    for ax, word, word_weights, regions in zip(panels[1:], words, weights, top_regions, strict=True):
        shares = word_weights[regions]
        draw_boxes(ax, picture, boxes[regions], COLOURS(shares / largest), [percent(share) for share in shares])
        ax.set_title(word, loc="left", fontsize=FONT_SIZE + 2, fontweight="bold")
        ax.set_title(f"whole image {percent(word_weights[0])}", loc="right", fontsize=FONT_SIZE)
    draw_heat_map(heat_map, weights[:, [0, *drawn]], words, ["whole\nimage", *names])
    return figure


def draw_text(attention: dict, rows: list[int], title: str) -> Figure:
    """The attention of words to words."""
    weights = attention["text_to_text"][rows].numpy()
    words = attention["words"]
    label_size = text_width(max(words, key=len))
    figure, _, heat_map = make_figure(title, 0, 0, weights.shape, (label_size, label_size))
    draw_heat_map(heat_map, weights, [words[row] for row in rows], words, rotation=90)
    return figure


def draw_image(attention: dict, picture: Image.Image, title: str) -> Figure:
    """The attention of the whole image and the regions to one another."""
    weights = attention["image_to_image"].numpy()
    boxes = attention["boxes"].numpy()
    names = [str(region) for region in range(1, len(boxes))]
    panel_height = PANEL_WIDTH * picture.height / picture.width
    label_size = (text_width("whole image"), TITLE_HEIGHT)
    figure, (panel,), heat_map = make_figure(title, 1, panel_height, weights.shape, label_size)
    draw_numbered_regions(panel, picture, boxes[1:], names)
    draw_heat_map(heat_map, weights, ["whole image", *names], ["whole\nimage", *names])
    return figure


def main():
    parser = HfArgumentParser(
        (PairArguments, AttentionArguments), description="Draw what the words of a caption look at in an image."
    )
    pair_args, attention_args = parser.parse_args_into_dataclasses()
    set_fonts()

    model = InterBERTModel.from_pretrained(pair_args.model_name_or_path)
    processor = InterBERTProcessor.from_pretrained(pair_args.model_name_or_path)
    regions = load_region_dataset(pair_args.dataset_name, pair_args.split, name=pair_args.dataset_config_name)
    row = find_row(regions, pair_args.image_id)
    caption = pair_args.caption or first_caption(regions, row, pair_args.caption_column)
    picture = load_picture(Pictures(regions, pair_args.image_dir), row)

    inputs = processor(text=caption, regions=regions[row], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, output_attentions=True)
    (attention,) = processor.post_process_attention(
        outputs,
        inputs,
        module=attention_args.module,
        layer=attention_args.layer,
        head=attention_args.head,
        target_sizes=[(picture.height, picture.width)],
    )
    title = f"{caption}\n{attention_args.describe()}"
    if attention_args.module == "image":
        figure = draw_image(attention, picture, title)
    else:
        rows = choose_words(attention["words"], attention_args.words, processor.tokenizer)
        if attention_args.module == "text":
            figure = draw_text(attention, rows, title)
        else:
            figure = draw_interaction(attention, rows, picture, attention_args.top_k, title)
    Path(attention_args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(attention_args.output, dpi=150)
    print(f"Image {regions[row]['image_id']}, “{caption}”: {attention_args.output}")


if __name__ == "__main__":
    main()
