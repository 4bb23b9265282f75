#!/usr/bin/env python
"""
Makes queries with pools, for precision at 5 (`run_image_retrieval.py --queries`), of a text column of a region dataset:
categories or names of products, captions. On a CPU, without a download:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/build_queries.py outputs/tiny_scenes outputs/tiny_queries.jsonl --text_column captions \\
        --pool_size 20

Categories of products, of a dataset of build_title_dataset.py:

    python examples/build_queries.py outputs/products queries.jsonl --text_column categories --pool_size 100

Captions that several images share, as short ones do:

    python examples/build_queries.py org/my-regions queries.jsonl --text_column captions_zh --min_relevant 2

Each distinct text is a query, in the order of the images: its relevant images are those that have it, and its pool is
these and others, drawn with a fixed seed, up to `--pool_size`. Of a text that more images have than half of a pool, so
many are drawn, and the rest is in its pool neither way. Texts that differ only in case, width, white space, punctuation
and symbols are one text, so that no image of a pool has it without being relevant. Images without regions do not count.
Texts that are left out are reported: those that no image has, or fewer than `--min_relevant`, or all.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from files import write_json_lines
from processing import RegionDataset, load_region_dataset
from processing.hard_negatives import normalize_caption
from processing.tasks import RetrievalQuery
from result_files import check_ids

PRECISION_AT = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make queries with pools of a text column of a region dataset.")
    parser.add_argument("source", help="Region dataset: a local folder or a Hub name.")
    parser.add_argument("destination", type=Path, help="The .jsonl file to write.")
    parser.add_argument("--text_column", required=True, help="A column of strings or of lists of strings.")
    parser.add_argument("--split", default="validation", help="Split of the images. By default validation.")
    parser.add_argument("--dataset_config_name", help="Configuration of the dataset.")
    parser.add_argument("--pool_size", type=int, default=100, help="Images of a pool, at most. By default 100.")
    parser.add_argument(
        "--min_relevant", type=int, default=1, help="Leaves texts out that fewer images have. By default 1."
    )
    parser.add_argument("--seed", type=int, default=0, help="Another seed draws other images. By default 0.")
    args = parser.parse_args()
    if args.destination.suffix != ".jsonl":
        parser.error(f"destination: expected a .jsonl file, got {args.destination}")
    if args.pool_size < 2:
        parser.error(f"--pool_size: expected at least 2, got {args.pool_size}")
    if not 1 <= args.min_relevant < args.pool_size:
        parser.error(f"--min_relevant: expected at least 1 and less than --pool_size, got {args.min_relevant}")
    return args


def read_texts(regions: RegionDataset, column: str) -> tuple[dict[str, list[str]], list[str]]:
    """
    Texts of the images.

    Returns:
        The texts of each image that has regions, by its id; the texts of the others.
    """
    check_ids("image_ids", regions.image_ids)
    texts: dict[str, list[str]] = {}
    of_others: list[str] = []
    for row, (image_id, count) in enumerate(zip(regions.image_ids, regions.region_counts(), strict=True)):
        own = regions.captions(row, column)
        if count:
            texts[image_id] = own
        else:
            of_others += own
    return texts, of_others


def build_queries(
    texts: Mapping[str, Sequence[str]], pool_size: int, min_relevant: int = 1, seed: int = 0
) -> tuple[list[RetrievalQuery], list[str], list[str]]:
    """
    A query for each distinct text. What is drawn depends on the text, the image ids and the seed, not on their order.

    Args:
        texts: Those of each image, by its id. One without letters and digits is none.
        pool_size: So many images at most are searched among for a text.
        min_relevant: A text that fewer images have is left out.
        seed: Other images for another seed.

    Returns:
        The queries, and the texts that are left out: those that too few images have, and those that all have.
    """
    spellings: dict[str, str] = {}
    relevant_images: dict[str, dict[str, None]] = {}
    for image_id, own in texts.items():
        for text in own:
            if key := normalize_caption(text):
                spellings.setdefault(key, text.strip())
                relevant_images.setdefault(key, {})[image_id] = None
    image_ids = sorted(texts)
    queries, too_rare, too_frequent = [], [], []
    for key, relevant in relevant_images.items():
        if len(relevant) < min_relevant:
            too_rare.append(spellings[key])
        elif len(relevant) == len(image_ids):
            too_frequent.append(spellings[key])
        else:
            rng = np.random.default_rng(list(hashlib.sha256(f"{seed} {key}".encode()).digest()))
            kept = set(relevant)
            if len(relevant) > pool_size // 2:
                kept = set(rng.choice(sorted(relevant), pool_size // 2, replace=False).tolist())
            candidates = [image_id for image_id in image_ids if image_id in kept or image_id not in relevant]
            # Of so many candidates enough are others, however many of the relevant ones are among them.
            drawn = rng.choice(len(candidates), min(pool_size, len(candidates)), replace=False)
            others = [candidates[number] for number in drawn if candidates[number] not in kept]
            in_pool = [image_id for image_id in relevant if image_id in kept]
            pool = [*in_pool, *others[: pool_size - len(in_pool)]]
            queries.append(RetrievalQuery(spellings[key], in_pool, pool))
    return queries, too_rare, too_frequent


def report(what: str, texts: Sequence[str]):
    if texts:
        print(f"Left out, {what}: {len(texts):,} texts, such as {', '.join(texts[:5])}")


def main():
    args = parse_args()
    regions = load_region_dataset(args.source, args.split, name=args.dataset_config_name)
    texts, of_others = read_texts(regions, args.text_column)
    queries, too_rare, too_frequent = build_queries(texts, args.pool_size, args.min_relevant, args.seed)
    if not queries:
        raise ValueError(
            f"Expected texts in column {args.text_column!r} of {args.source}, {args.split}, that at least "
            f"{args.min_relevant:,} (`--min_relevant`) and not all of {len(texts):,} images with regions have, got "
            f"{len(too_rare) + len(too_frequent):,} others."
        )
    write_json_lines(args.destination, map(asdict, queries))
    known = {normalize_caption(text) for own in texts.values() for text in own}
    without_images = {normalize_caption(text): text for text in of_others if normalize_caption(text) not in known}
    report("without an image that has regions", list(without_images.values()))
    report(f"of fewer than {args.min_relevant:,} images", too_rare)
    report("of all images", too_frequent)
    highest = np.mean([min(len(query.relevant), PRECISION_AT) / PRECISION_AT for query in queries])
    print(
        f"{len(queries):,} texts with their pools among {len(texts):,} images are in {args.destination}. A perfect "
        f"ranking has a precision at {PRECISION_AT} of {100 * highest:.1f} %."
    )


if __name__ == "__main__":
    main()
