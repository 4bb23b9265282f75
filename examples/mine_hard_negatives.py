#!/usr/bin/env python
"""
Adds hard negatives for image-text matching to a region dataset: for each image the captions of other images that are
most like its own (cosine of TF-IDF), in the column `hard_negatives`, and whose captions they are, in the column
`hard_negatives_image_ids`. On a CPU, without a download:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/mine_hard_negatives.py outputs/tiny_scenes outputs/tiny_scenes_hard --num_negatives 10

The same of Chinese captions, which have no blanks between words, by two processes:

    python examples/mine_hard_negatives.py outputs/tiny_scenes outputs/tiny_scenes_hard_zh --num_negatives 10 \\
        --caption_column captions_zh --analyzer char --images_per_pool 100 --rows_per_shard 100 --num_proc 2

Each split is mined by itself, into one folder:

    python examples/mine_hard_negatives.py outputs/tiny_scenes outputs/tiny_scenes_hard --num_negatives 10 \\
        --split validation

The time grows with the square of the number of captions: 30,000 of 6,000 images take about 16 seconds. Larger datasets
are divided into pools of images, in order, and the negatives of an image are captions of its own pool.

What was stopped goes on where it was when the same command is given again, and ends with the same bytes.
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from convert_regions import Plan, add_output_arguments, check_output_args, check_positive, run
from processing.hard_negatives import find_hard_negatives
from region_conversion import Converter, run_tasks
from region_sources import RegionSource, open_source

COLUMN = "hard_negatives"
IMAGE_COLUMN = f"{COLUMN}_image_ids"
# Five characters or more, one of them Chinese, that no white space or punctuation divides: hardly a single word.
UNDIVIDED_CHINESE = re.compile(r"\b(?=\w{5})\w*[\u3400-\u4dbf\u4e00-\u9fff]")
# Of arguments, those that `find_hard_negatives` takes.
SEARCH_ARGUMENTS = ("num_negatives", "max_similarity", "analyzer")


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Add hard negative captions to a region dataset.")
    parser.add_argument("source", help="Region dataset: folder, or name on the Hub.")
    parser.add_argument("destination", help="Folder for the dataset with the further column hard_negatives.")
    parser.add_argument("--split", help="Split to read, and to write under the same name. By default train.")
    parser.add_argument("--dataset_config_name", help="Configuration of the source.")
    parser.add_argument("--caption_column", default="captions", help="Column with the captions.")

    search = parser.add_argument_group("hard negatives")
    search.add_argument("--num_negatives", type=int, default=20, help="At most so many captions for each image.")
    search.add_argument(
        "--max_similarity",
        type=float,
        default=0.99,
        help="Leaves out captions that are more similar to one of the image's: they may well describe it.",
    )
    search.add_argument(
        "--analyzer",
        choices=["word", "char"],
        default="word",
        help="Compares words, or characters and pairs of them, for languages without blanks between words.",
    )
    search.add_argument(
        "--images_per_pool", type=int, default=50_000, help="Negatives are searched among at most so many images."
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--on_error",
        choices=["raise", "skip"],
        default="raise",
        help="Stops at the first damaged or invalid image, or leaves out all of them and reports them.",
    )
    add_output_arguments(output)
    parser.set_defaults(to="parquet")
    args = parser.parse_args()
    try:
        check_output_args(args)
        check_positive(args, "num_negatives", "images_per_pool")
        if not 0 < args.max_similarity <= 1:
            raise ValueError(f"--max_similarity: expected above 0 and at most 1, got {args.max_similarity}")
    except ValueError as error:
        parser.error(str(error))
    return parser, args


@dataclass(frozen=True)
class Pool:
    """
    Images among which hard negatives are searched.

    Args:
        image_ids: Those of the images.
        captions: Those of each image.
        path: File for what is found, see [`find_hard_negatives`]. It is complete if it exists.
    """

    image_ids: list[str]
    captions: list[list[str]]
    path: Path

    def hard_negatives(self) -> dict[str, dict[str, list[str]]]:
        """By column and image: what was found, and which images these are captions of."""
        flat_captions = list(chain.from_iterable(self.captions))
        images = np.repeat(np.arange(len(self.captions)), [len(captions) for captions in self.captions])
        columns: dict[str, dict[str, list[str]]] = {COLUMN: {}, IMAGE_COLUMN: {}}
        for image_id, places in zip(self.image_ids, np.load(self.path), strict=True):
            places = places[places >= 0]
            columns[COLUMN][image_id] = [flat_captions[place] for place in places]
            columns[IMAGE_COLUMN][image_id] = [self.image_ids[image] for image in images[places]]
        return columns


def mine_pool(search_arguments: Mapping[str, Any], pool: Pool, advance: Callable[[int], Any]):
    """Writes the file of a pool."""
    found = find_hard_negatives(pool.captions, **search_arguments, advance=advance)
    unfinished = pool.path.with_name(f"{pool.path.name}.unfinished")
    with open(unfinished, "wb") as file:
        np.save(file, found)
    unfinished.replace(pool.path)


@dataclass
class MiningPlan(Plan):
    """
    All images, with hard negatives.

    Args:
        captions: Those of each of `image_ids`.
    """

    captions: list[list[str]]

    script = "mine_hard_negatives.py"

    def make_texts(self, work_dir: Path, num_proc: int) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
        images_per_pool = self.settings["images_per_pool"]
        num_pools = -(-len(self.image_ids) // images_per_pool)
        # Of equal size: a single image that is left over would have nothing to be compared with.
        starts = [len(self.image_ids) * number // num_pools for number in range(num_pools + 1)]
        pools = []
        for number, (start, stop) in enumerate(pairwise(starts)):
            path = work_dir / f"hard_negatives-{number:05d}.npy"
            pools.append(Pool(self.image_ids[start:stop], self.captions[start:stop], path))
        missing = [pool for pool in pools if not pool.path.exists()]
        num_kept = len(self.image_ids) - sum(len(pool.image_ids) for pool in missing)
        search_arguments = {name: self.settings[name] for name in SEARCH_ARGUMENTS}
        with tqdm(total=len(self.image_ids), initial=num_kept, unit="image", desc="mining") as progress_bar:
            run_tasks(functools.partial(mine_pool, search_arguments), missing, num_proc, progress_bar.update)

        columns: dict[str, dict[str, list[str]]] = {COLUMN: {}, IMAGE_COLUMN: {}}
        for pool in pools:
            for name, values in pool.hard_negatives().items():
                columns[name].update(values)
        num_without = sum(not texts for texts in columns[COLUMN].values())
        in_pools = "one pool" if num_pools == 1 else f"{num_pools:,} pools of at most {images_per_pool:,} images"
        note = (
            f"Hard negatives are at most {self.settings['num_negatives']} captions of other images each, from "
            f"`{self.settings['caption_column']}`, searched in {in_pools}. {num_without:,} of {len(self.image_ids):,} "
            "images have none."
        )
        return columns, [note]


def make_plan(args: argparse.Namespace) -> MiningPlan:
    source = open_source([args.source], args.split, args.dataset_config_name, token=args.hub_token)
    captions = read_captions(source, args.caption_column)
    if args.analyzer == "word":
        check_words(chain.from_iterable(captions.values()))
    settings = {
        "source": [Path(args.source).resolve().name],
        "source_format": source.format_name,
        "source_fingerprint": source.fingerprint(),
    }
    names = ("dataset_config_name", "caption_column", *SEARCH_ARGUMENTS, "images_per_pool", "rows_per_shard")
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return MiningPlan(
        source=source,
        converter=Converter(source, text_types=dict.fromkeys((COLUMN, IMAGE_COLUMN), pa.list_(pa.string()))),
        image_ids=source.image_ids,
        missing={},
        texts={},
        not_in_source={},
        settings=settings,
        captions=[captions[image_id] for image_id in source.image_ids],
    )


def read_captions(source: RegionSource, column: str) -> dict[str, list[str]]:
    """
    Captions by image, from nothing but their column.

    Raises:
        ValueError: there is no such column, it holds no captions, or none at all; or the source has hard negatives.
    """
    captions: dict[str, list[str]] = {}
    for reader in source.readers:
        with pq.ParquetFile(reader.path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(f"{reader.path.name}: expected captions in column {column!r}, got {', '.join(names)}.")
            if COLUMN in names:
                raise ValueError(f"{reader.path.name} has a column {COLUMN!r} already: give the dataset without it.")
            table = file.read(columns=["image_id", column])
        for image_id, value in zip(*(table.column(name).to_pylist() for name in ("image_id", column)), strict=True):
            values = [value] if isinstance(value, str) else value or []
            if not isinstance(values, list) or not all(isinstance(caption, str) for caption in values):
                raise ValueError(f"image_id {image_id}: expected captions in column {column!r}, got {value!r:.80}.")
            # Of an image that is there more than once, the first record counts.
            captions.setdefault(image_id, values)
    if not any(captions.values()):
        raise ValueError(f"None of {len(captions):,} images has a caption in column {column!r}.")
    return captions


def check_words(captions: Iterable[str]):
    """
    Raises:
        ValueError: most captions have Chinese words without anything between them, which would count as one.
    """
    is_undivided = [UNDIVIDED_CHINESE.search(caption) is not None for caption in captions]
    if 2 * sum(is_undivided) > len(is_undivided):
        raise ValueError(
            f"--analyzer word: expected captions with blanks between words, but {sum(is_undivided):,} of "
            f"{len(is_undivided):,} have Chinese ones without: give --analyzer char."
        )


def main():
    run(*parse_args(), make_plan)


if __name__ == "__main__":
    main()
