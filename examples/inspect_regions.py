#!/usr/bin/env python
"""
Says what is in region features, in any format of the field: columns, counts, histograms, classes, bad rows. On a CPU,
without a download:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/inspect_regions.py outputs/tiny_scenes --split validation \\
        --objects_vocab outputs/tiny_scenes/objects_vocab.txt

The boxes of one image, with the names of their classes, on the photograph or on a blank canvas:

    python examples/inspect_regions.py outputs/tiny_scenes --split validation --draw validation-000003 \\
        --objects_vocab outputs/tiny_scenes/objects_vocab.txt --output outputs/boxes.png
    python examples/inspect_regions.py train2014_obj36.tsv --draw COCO_train2014_000000132417 \\
        --objects_vocab objects_vocab.txt --image_dir train2014 --output boxes.png
"""

import argparse
import io
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from pictures import open_picture, upright
from processing.region_formats import check_record
from processing.tasks import canonical_image_id
from region_conversion import region_scores
from region_drawing import CANVAS, draw_boxes, set_fonts
from region_sources import RegionSource, open_source, read_image_sizes
from training import format_table

NUM_BAD_ROWS = 10  # that are shown
NUM_CLASSES = 20  # that are shown, the most frequent ones
NUM_BINS = 12  # of a histogram
BAR_WIDTH = 40  # characters
FIGURE_WIDTH = 10  # inches
CANVAS_SIZE = 640  # pixels, where the size of the image is unknown
EMPTY_LIST = "list<nothing>"


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Say what is in region features, in any format of the field.")
    parser.add_argument(
        "dataset", nargs="+", help="Region dataset (folder, or name on the Hub), or file or folder of another format."
    )
    parser.add_argument("--split", help="Split of a region dataset, if it has several.")
    parser.add_argument("--dataset_config_name", help="Configuration of a region dataset.")
    parser.add_argument("--image_sizes", help="Sizes of images for formats that have none, as in convert_regions.py.")
    parser.add_argument("--num_images", type=int, help="Reads the first so many images only.")
    parser.add_argument(
        "--objects_vocab", help="Names of the classes, one in each line; of synonyms with commas the first is shown."
    )
    parser.add_argument("--draw", metavar="ID", help="Draws the boxes of this image, and does nothing else.")
    parser.add_argument(
        "--image_dir", help="Folder with the photographs, named by image id. By default a blank canvas."
    )
    parser.add_argument("--output", default="boxes.png", help="File to draw to; the extension names the format.")
    args = parser.parse_args()
    if args.num_images is not None and args.num_images < 1:
        parser.error(f"--num_images: expected at least 1, got {args.num_images}")
    return parser, args


def read_class_names(path: str | None) -> list[str]:
    if path is None:
        return []
    return [line.split(",")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]


def class_name(class_id: int, names: Sequence[str]) -> str:
    if class_id < 0:
        return "no class"
    return names[class_id] if class_id < len(names) else f"class {class_id}"


def region_classes(record: Mapping[str, Any]) -> np.ndarray | None:
    """The class of each region, −1 for none: as the record says, or else the likeliest one; None if it has neither."""
    if "class_ids" in record:
        return record["class_ids"]
    if "class_probs" in record:
        return record["class_probs"][:, 1:].argmax(axis=1)
    return None


# ---------------------------------------------------------------- statistics


class FixedHistogram:
    """Counts of numbers from 0 to 1, in bins of one width. Numbers beyond count for the outermost ones."""

    def __init__(self):
        self.edges = np.linspace(0, 1, 11)
        self.counts = np.zeros(10, dtype=np.int64)
        self.sum = 0.0

    def add(self, values: np.ndarray):
        self.counts += np.histogram(values.clip(0, 1), self.edges)[0]
        self.sum += float(values.sum(dtype=np.float64))

    def __str__(self) -> str:
        labels = [f"{low:.1f} to {high:.1f}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        return format_bars(labels, self.counts)


class Statistics:
    """What is known of the records so far. Memory grows by a few numbers for each image."""

    def __init__(self):
        self.column_types: dict[str, Counter] = {}
        self.region_counts: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.box_range = np.array([[np.inf, np.inf], [-np.inf, -np.inf]])  # lowest x and y, highest x and y
        self.box_areas = FixedHistogram()
        self.scores = FixedHistogram()
        self.class_counts: Counter[int] = Counter()
        self.text_counts: dict[str, list[int]] = {}
        self.num_values = 0  # of features
        self.num_zeros = 0
        self.feature_sum = self.feature_square_sum = self.feature_norm_sum = 0.0
        self.feature_range = (np.inf, -np.inf)
        self.bad_rows: dict[str, str] = {}

    def add(self, image_id: str, source: RegionSource):
        """Reads an image. Bad rows are listed, and are left out of all numbers."""
        try:
            record = source[image_id]
            check_record(record)
        except ValueError as error:
            self.bad_rows[image_id] = source.without_paths(str(error))
            return
        for name, value in record.items():
            self.column_types.setdefault(name, Counter())[value_type(value)] += 1
            if isinstance(value, list):
                self.text_counts.setdefault(name, []).append(len(value))
        self.region_counts.append(len(record["boxes"]))
        self.sizes.append((record["width"], record["height"]))
        corners = record["boxes"].reshape(-1, 2)
        self.box_range[0] = np.minimum(self.box_range[0], corners.min(axis=0))
        self.box_range[1] = np.maximum(self.box_range[1], corners.max(axis=0))
        sides = (record["boxes"][:, 2:] - record["boxes"][:, :2]).astype(np.float64)
        self.box_areas.add(sides.prod(axis=1) / (record["width"] * record["height"]))
        if (scores := region_scores(record)) is not None:
            self.scores.add(scores)
        if (classes := region_classes(record)) is not None:
            self.class_counts.update(classes.tolist())
        features = record["features"].astype(np.float64)
        self.num_values += features.size
        self.num_zeros += int((features == 0).sum())
        self.feature_sum += features.sum()
        self.feature_square_sum += (features**2).sum()
        self.feature_norm_sum += np.linalg.norm(features, axis=1).sum()
        low, high = self.feature_range
        self.feature_range = (min(low, features.min()), max(high, features.max()))


def value_type(value: Any) -> str:
    """The type of a value of a record, such as `list<float32[4]>`."""
    if isinstance(value, np.ndarray):
        return f"list<{value.dtype}{list(value.shape[1:]) if value.ndim > 1 else ''}>"
    if isinstance(value, list):
        return f"list<{value_type(value[0])}>" if value else EMPTY_LIST
    if isinstance(value, dict):
        return "{" + ", ".join(value) + "}"
    return {str: "string", type(None): "nothing"}.get(type(value), type(value).__name__)


def without_empty_lists(kinds: Counter[str]) -> Counter[str]:
    """Types of a column, empty lists counted as lists of what others hold."""
    kinds = kinds.copy()
    num_empty = kinds.pop(EMPTY_LIST, 0)
    kinds[kinds.most_common(1)[0][0] if kinds else EMPTY_LIST] += num_empty
    return kinds


def format_bars(labels: Sequence[str], counts: Sequence[int], total: int | None = None) -> str:
    """A histogram in text, with shares of the total, by default the sum of the counts."""
    total, largest = total or sum(counts), max(counts)
    width = max(map(len, labels))
    lines = []
    for label, count in zip(labels, counts, strict=True):
        bar = "█" * round(BAR_WIDTH * count / largest)
        lines.append(f"  {label:>{width}}  {count:>11,}  {count / total:>6.1%}  {bar}".rstrip())
    return "\n".join(lines)


def format_histogram(numbers: Sequence[int]) -> str:
    """A histogram of whole numbers: of each of them if they are few, otherwise of ranges of one width."""
    low, high = min(numbers), max(numbers)
    width = -(-(high - low + 1) // NUM_BINS)
    counts = np.bincount((np.array(numbers) - low) // width)
    starts = [low + width * i for i in range(len(counts))]
    labels = [str(start) if width == 1 else f"{start} to {min(start + width - 1, high)}" for start in starts]
    return format_bars(labels, counts.tolist())


def format_statistics(statistics: Statistics, class_names: Sequence[str]) -> str:
    num_images, num_regions = len(statistics.region_counts), sum(statistics.region_counts)
    paragraphs = []
    if num_images:
        width = max(map(len, statistics.column_types))
        columns = [
            f"  {name:<{width}}  {kind}" + (f"  ({count:,} of {num_images:,} images)" if count < num_images else "")
            for name, kinds in statistics.column_types.items()
            for kind, count in without_empty_lists(kinds).most_common()
        ]
        paragraphs.append("\n".join(["Columns", *columns]))

        widths, heights = np.array(statistics.sizes).T
        sizes = f"{widths.min()} x {heights.min()} to {widths.max()} x {heights.max()} pixels, {widths.mean():.0f} x "
        sizes += f"{heights.mean():.0f} on average"
        normalized = int(((widths == 1) & (heights == 1)).sum())
        if normalized:
            sizes += f"; {normalized:,} without a size, their boxes being shares of it"
        paragraphs.append(f"Image sizes: {sizes}")
        paragraphs += [
            f"Regions per image: {num_regions:,} in all, {num_regions / num_images:.1f} on average\n"
            + format_histogram(statistics.region_counts),
            f"Boxes: {format_box_range(statistics.box_range)}; area, as a share of the image, "
            f"{statistics.box_areas.sum / num_regions:.3f} on average\n{statistics.box_areas}",
            format_features(statistics),
        ]
        for name, counts in statistics.text_counts.items():
            numbers = f"{sum(counts):,} in all, {np.mean(counts):.1f} per image ({min(counts)} to {max(counts)})"
            without = f", none for {counts.count(0):,} of {num_images:,} images" if 0 in counts else ""
            paragraphs.append(f"{name}: {numbers}{without}")
        if statistics.scores.counts.any():
            mean = statistics.scores.sum / statistics.scores.counts.sum()
            paragraphs.append(f"Scores: {mean:.3f} on average\n{statistics.scores}")
        if statistics.class_counts:
            paragraphs.append(format_classes(statistics.class_counts, class_names))
    bad = [f"  {image_id}: {message}" for image_id, message in islice(statistics.bad_rows.items(), NUM_BAD_ROWS)]
    if len(statistics.bad_rows) > NUM_BAD_ROWS:
        bad.append(f"  … and {len(statistics.bad_rows) - NUM_BAD_ROWS:,} more")
    paragraphs.append("\n".join([f"Bad rows: {len(statistics.bad_rows):,}, of which nothing above is counted", *bad]))
    return "\n\n".join(paragraphs)


def format_box_range(box_range: np.ndarray) -> str:
    (low_x, low_y), (high_x, high_y) = box_range.tolist()
    return f"x from {low_x:.2f} to {high_x:.2f}, y from {low_y:.2f} to {high_y:.2f}"


def format_features(statistics: Statistics) -> str:
    mean = statistics.feature_sum / statistics.num_values
    variance = statistics.feature_square_sum / statistics.num_values - mean**2
    low, high = statistics.feature_range
    return (
        f"Features: mean {mean:.4f}, standard deviation {max(variance, 0) ** 0.5:.4f}, from {low:.4f} to {high:.4f}, "
        f"{statistics.num_zeros / statistics.num_values:.1%} zeros, norm of a vector "
        f"{statistics.feature_norm_sum / sum(statistics.region_counts):.2f} on average"
    )


def format_classes(counts: Counter[int], names: Sequence[str]) -> str:
    known = [class_id for class_id in counts if class_id >= 0]
    title = f"Classes: {len(known):,} of {len(names):,}" if names else f"Classes: {len(known):,}"
    shown = counts.most_common(NUM_CLASSES)
    if len(counts) > NUM_CLASSES:
        title += f", of which the {NUM_CLASSES} most frequent are"
    labels = [class_name(class_id, names) for class_id, _ in shown]
    bars = format_bars(labels, [count for _, count in shown], total=counts.total())
    without_name = max(known, default=0) >= len(names) > 0
    note = f"\n  There are ids up to {max(known):,}: the names are those of other classes." if without_name else ""
    return f"{title}\n{bars}{note}"


# ---------------------------------------------------------------- drawing


def find_image(source: RegionSource, image_id: str) -> str:
    """The id of the source for an image that may be called by another of its names."""
    if image_id in source.image_ids:
        return image_id
    canonical = canonical_image_id(image_id)
    for other in source.image_ids:
        if canonical_image_id(other) == canonical:
            return other
    raise ValueError(
        f"--draw: expected one of {len(source):,} images, such as {', '.join(source.image_ids[:3])}; got {image_id}."
    )


def picture_of(record: Mapping[str, Any], image_dir: str | None) -> Image.Image:
    """The photograph of a record in RGB, or a blank canvas."""
    if image_dir is not None:
        return open_picture(image_dir, record["image_id"])
    image = record.get("image")
    if isinstance(image, dict) and image.get("bytes"):
        return upright(Image.open(io.BytesIO(image["bytes"])))
    if record["width"] == record["height"] == 1:
        return Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), CANVAS)
    return Image.new("RGB", (record["width"], record["height"]), CANVAS)


def region_table(record: Mapping[str, Any], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Class, score and box of each region, the highest score first."""
    scores, classes = region_scores(record), region_classes(record)
    order = np.arange(len(record["boxes"])) if scores is None else np.argsort(-scores, kind="stable")
    rows = []
    for region in order:
        row: dict[str, Any] = {"region": int(region)}
        if classes is not None:
            row["class"] = class_name(int(classes[region]), class_names)
        if scores is not None:
            row["score"] = float(scores[region])
        rows.append(row | dict(zip(("x1", "y1", "x2", "y2"), record["boxes"][region].tolist(), strict=True)))
    return rows


def draw_regions(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], picture: Image.Image) -> Figure:
    """The boxes on a picture of whatever size, labelled by class and score, or by number where there are no classes."""
    figure = Figure((FIGURE_WIDTH, FIGURE_WIDTH * picture.height / picture.width))
    scale = np.array([picture.width / record["width"], picture.height / record["height"]] * 2)
    boxes = np.array([[row[name] for name in ("x1", "y1", "x2", "y2")] for row in rows]) * scale
    colours = [colormaps["tab20"](number % 20) for number in range(len(rows))]
    labels = [row.get("class", str(row["region"])) + (f" {row['score']:.2f}" if "score" in row else "") for row in rows]
    draw_boxes(figure.add_axes((0, 0, 1, 1)), picture, boxes, colours, labels)
    return figure


def main():
    parser, args = parse_args()
    try:
        image_sizes = None if args.image_sizes is None else read_image_sizes(args.image_sizes)
        source = open_source(args.dataset, args.split, args.dataset_config_name, image_sizes)
        class_names = read_class_names(args.objects_vocab)
        if args.draw is not None:
            record = source[find_image(source, args.draw)]
            check_record(record)
            picture = picture_of(record, args.image_dir)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")

    if args.draw is not None:
        rows = region_table(record, class_names)
        set_fonts()
        figure = draw_regions(record, rows, picture)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
        print(format_table(rows))
        print(f"Image {record['image_id']}, {record['width']} x {record['height']}: {args.output}")
        return

    statistics = Statistics()
    image_ids = source.image_ids[: args.num_images]
    for image_id in tqdm(image_ids, unit="image"):
        statistics.add(image_id, source)
    some = "" if len(image_ids) == len(source) else f", read are the first {len(image_ids):,}"
    noun = "image" if len(source) == 1 else "images"
    print(f"{', '.join(args.dataset)} ({source.format_name}): {len(source):,} {noun}{some}")
    if source.duplicate_ids:
        ids = reprlib.repr(source.duplicate_ids)
        print(f"More than once, where the first record counts: {len(source.duplicate_ids):,}, {ids}")
    print(f"\n{format_statistics(statistics, class_names)}")


if __name__ == "__main__":
    main()
