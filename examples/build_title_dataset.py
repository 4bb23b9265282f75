#!/usr/bin/env python
"""
Makes region datasets of product images with Chinese titles: cleans the titles of a table of products, joins them to the
regions of the products' images, and holds images out. On a CPU, without a download:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    (echo product_id,title,image_id,category; for i in $(seq 100 199); do
        echo "$i,现货 红色商品$i号,train-000$i,图形$((i % 2))"; done) > outputs/tiny_products.csv
    python examples/build_title_dataset.py outputs/tiny_products.csv outputs/tiny_products --source_split train \\
        --regions outputs/tiny_scenes --caption_column titles --validation_size 10 --test_size 10 \\
        --pretrain_categories 图形0 --finetune_categories 图形1

The table is a .csv, .tsv, .jsonl, .json or .parquet with the columns product_id, title, image_id and category, or with
other ones:

    python examples/build_title_dataset.py products.parquet outputs/products --regions regions.tsv --num_proc 8 \\
        --product_id_column item_id --category_column cate_name \\
        --pretrain_categories 女装 --finetune_categories 女鞋 男鞋

Without regions: cleaned titles alone, as `titles.jsonl`, here of a table without a header.

    python examples/build_title_dataset.py product_titles.tsv outputs/titles --titles_only \\
        --columns product_id title parts

What becomes of a title is said at `TitleCleaner` and `WordListSpamFilter` in `processing/titles.py`. Of products with
the same image and the same title the first is kept; one image may have several titles, and several images the same one.
A row of the dataset is an image with its regions, and with its products in three lists: `captions`, `product_ids` and,
where the table has any, `categories`. The splits are:

| split | images | for |
|---|---|---|
| `pretrain` | of `--pretrain_categories` | `run_pretrain.py --train_split pretrain` |
| `train` | of `--finetune_categories`; of all products where there are no categories | finetuning |
| `validation`, `test` | held out of `train` | every script, by these names |

No image is in two splits: one with products of both kinds of categories is an image of `--finetune_categories`. Nor is
what is held out trained on by another image: images that have a product id in common, or a title that differs at most
in case, width, white space and punctuation, are of one group, also by way of others. Of a group that is held out one
image is, and the others are left out of all splits, so that one image is right for each title. Rows that are dropped
for their titles still say which product an image shows.

A run that was stopped goes on where it was when the same command is given again, and ends with the same bytes. A folder
that was begun with other settings is refused before anything is written, as no split of it is drawn by itself.
`report.json` says how many products were kept, cut and dropped, and why, with examples; `dropped.jsonl` has all that
were dropped, each with product_id, image_id, title, reason and detail.
"""

import argparse
import copy
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from convert_regions import (
    Plan,
    add_output_arguments,
    check_output_args,
    check_positive,
    convert_to_parquet,
    create_repository,
    push_dataset,
)
from files import file_digest, write_json, write_json_lines
from processing.tasks import canonical_image_id
from processing.tasks.files import numbered_lines, read_json
from processing.titles import (
    PRODUCT_FIELDS,
    Product,
    TitleCleaner,
    TitleDropped,
    WordListSpamFilter,
    draw_examples,
    draw_images,
    duplicates_of_earlier,
    group_images,
    read_products,
)
from region_conversion import SKIP_HINT, Converter, DatasetFolder, NoRegionLeft
from region_sources import RegionSource, open_source, read_image_sizes

NUM_EXAMPLES = 10
FURTHER_COLUMNS = ("product_ids", "categories")
# Arguments that go with --regions, and their values where they are not given.
REGION_DEFAULTS = {
    "source_split": None,
    "image_sizes": None,
    "confidence_above": 0.1,
    "max_regions": 16,
    "on_error": "raise",
    "dtype": None,
    "pretrain_categories": None,
    "finetune_categories": None,
    "validation_size": 1000,
    "test_size": 1000,
    "seed": 0,
    "caption_column": "captions",
    "rows_per_shard": None,
    "num_proc": None,
    "push_to_hub": False,
    "hub_dataset_id": None,
    "hub_token": None,
}
# Why a product is not in the dataset.
REASONS = {
    "other category": "of another category",
    "no title": "without a title",
    "no Chinese character": "without a Chinese character",
    "spam": "spam",
    "no Chinese character left": "without a Chinese character before the cut",
    "duplicate": "with image and title of an earlier one",
    "no regions": "without regions of an image",
    "image of finetuning": "of a pretraining category, with an image of a finetuning one",
    "like a held-out image": "with product or title of a held-out image",
    "damaged": "with damaged regions",
    "invalid": "with invalid regions",
    "no region left": "without a region above --confidence_above",
}


# ---------------------------------------------------------------- arguments


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Make region datasets of product images with Chinese titles.")
    parser.add_argument("products", help="Table of products: .csv, .tsv, .jsonl, .json, .parquet; .txt of titles.")
    parser.add_argument("destination", help="Folder for the dataset, or for the cleaned titles.")
    parser.add_argument(
        "--regions", nargs="+", help="Regions of the products' images: files and folders of any format, datasets."
    )
    parser.add_argument("--titles_only", action="store_true", help="Cleans the titles, without regions and splits.")

    table = parser.add_argument_group("table of products")
    table.add_argument("--columns", nargs="+", help="Names of the columns of a .tsv that has no header.")
    for name in PRODUCT_FIELDS:
        table.add_argument(f"--{name}_column", default=name, help=f"By default {name}.")

    titles = parser.add_argument_group("titles")
    titles.add_argument(
        "--max_characters", type=int, default=36, help="Longer titles are cut at the end of a word. By default 36."
    )
    titles.add_argument(
        "--normalize_width", action="store_true", help="Full-width letters, digits, punctuation become half-width."
    )
    titles.add_argument("--to_simplified", action="store_true", help="Traditional characters become simplified.")
    titles.add_argument(
        "--spam_words",
        help="File with an advertising word in each line, in place of all words and phrases that are built in.",
    )
    titles.add_argument(
        "--max_spam_share",
        type=float,
        help="Drops titles of which advertising words are a larger share; 0 drops those with any. By default 0.5.",
    )
    titles.add_argument(
        "--spam_filter",
        help="Another filter, as module:function. It is given a title, and returns whether to drop it, or why.",
    )
    titles.add_argument("--no_spam_filter", action="store_true", help="Drops no title as spam.")

    regions = parser.add_argument_group("images and regions")
    regions.add_argument("--source_split", help="Split of --regions, where that is a dataset with several.")
    regions.add_argument("--image_sizes", help="Sizes of images for formats without, as for convert_regions.py.")
    regions.add_argument(
        "--confidence_above",
        type=float,
        help="Keeps regions with a higher score; -1 keeps all, also those without scores. By default 0.1.",
    )
    regions.add_argument("--max_regions", type=int, help="Of these the highest scores, so many. By default 16.")
    regions.add_argument("--dtype", choices=["float16", "float32"], help="Of features. By default as in the source.")
    regions.add_argument(
        "--on_error",
        choices=["raise", "skip"],
        help="Stops at the first damaged or invalid image, or leaves out all of them and reports them.",
    )

    splits = parser.add_argument_group("splits")
    splits.add_argument("--pretrain_categories", nargs="+", help="Categories of the split pretrain.")
    splits.add_argument("--finetune_categories", nargs="+", help="Those of train, validation and test.")
    splits.add_argument("--validation_size", type=int, help="Images of the split validation. By default 1000.")
    splits.add_argument("--test_size", type=int, help="Images of the split test. By default 1000.")
    splits.add_argument("--seed", type=int, help="Another seed holds out other images. By default 0.")

    output = parser.add_argument_group("output")
    output.add_argument("--caption_column", help="Column for the titles. By default captions.")
    add_output_arguments(output)
    parser.set_defaults(split=None)
    args = parser.parse_args()
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def check_args(args: argparse.Namespace):
    """Fills in the defaults, and refuses what does not go together."""
    if args.titles_only == bool(args.regions):
        raise ValueError(f"expected one of --regions and --titles_only, got {'both' if args.regions else 'neither'}")
    if args.spam_filter and (args.spam_words or args.max_spam_share is not None):
        raise ValueError("--spam_words and --max_spam_share are for the filter that is built in, got --spam_filter too")
    for name in ("spam_filter", "spam_words", "max_spam_share"):
        if args.no_spam_filter and getattr(args, name) is not None:
            raise ValueError(f"expected --no_spam_filter or --{name}, got both")
    if args.max_spam_share is not None and not 0 <= args.max_spam_share <= 1:
        raise ValueError(f"--max_spam_share: expected from 0 to 1, got {args.max_spam_share}")
    check_positive(args, "max_characters")
    if args.titles_only:
        for name in REGION_DEFAULTS:
            # Switches are False where they are not given, other arguments None. A number may be 0.
            if getattr(args, name) is not None and getattr(args, name) is not False:
                raise ValueError(f"--{name} goes with --regions, got --titles_only")
        return
    for name, default in REGION_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    check_output_args(args)
    check_positive(args, "max_regions")
    for name in ("validation_size", "test_size"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}: expected at least 0, got {getattr(args, name)}")
    if bool(args.pretrain_categories) != bool(args.finetune_categories):
        given = "pretrain" if args.pretrain_categories else "finetune"
        raise ValueError(
            f"--pretrain_categories and --finetune_categories go together, got only --{given}_categories. Without "
            "either of them, all products are for training."
        )
    if args.caption_column in FURTHER_COLUMNS:
        raise ValueError(f"--caption_column: expected another name than {FURTHER_COLUMNS}, got {args.caption_column}")
    both = sorted(set(args.pretrain_categories or []) & set(args.finetune_categories or []))
    if both:
        raise ValueError(f"expected categories that are for pretraining or for finetuning, got {both} for both")


def make_spam_filter(args: argparse.Namespace) -> tuple[Callable[[str], Any] | None, dict[str, Any]]:
    """The filter, if any, and the settings that decide on it. Code and words are named by their contents."""
    if args.no_spam_filter:
        return None, {"no_spam_filter": True}
    if args.spam_filter:
        module_name, colon, name = args.spam_filter.partition(":")
        sys.path.append("")  # modules of the working directory
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--spam_filter {args.spam_filter}: expected module:function, {error}.") from error
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"--spam_filter {args.spam_filter}: expected a function {name!r} in {module_name}.")
        code = getattr(module, "__file__", None)
        return function, {"spam_filter": args.spam_filter + (f" (sha256 {file_digest(code)})" if code else "")}
    options, settings = {}, {}
    if args.spam_words is not None:
        options |= {"words": [line.strip() for _, line in numbered_lines(args.spam_words)], "phrases": []}
        if not options["words"]:
            raise ValueError(f"{args.spam_words}: expected a word in each line, got none.")
        settings["spam_words"] = f"{Path(args.spam_words).name} (sha256 {file_digest(args.spam_words)})"
    if args.max_spam_share is not None:
        options["max_share"] = settings["max_spam_share"] = args.max_spam_share
    return WordListSpamFilter(**options), settings


# ---------------------------------------------------------------- products


@dataclass
class Ledger:
    """
    What has become of the products of a table.

    Args:
        kept: Products with their captions.
        cut: Those of them whose caption is only a part of the title.
        dropped: By reason, products each with a detail, which may be empty.
    """

    kept: list[tuple[Product, str]]
    cut: set[tuple[Product, str]] = field(default_factory=set)
    dropped: dict[str, list[tuple[Product, str]]] = field(default_factory=dict)

    def drop(self, reason: str, details: Sequence[str | None]):
        """Drops those that are kept and have a detail, which may be empty but not None."""
        for (product, _), detail in zip(self.kept, details, strict=True):
            if detail is not None:
                self.dropped.setdefault(reason, []).append((product, detail))
        self.kept = [item for item, detail in zip(self.kept, details, strict=True) if detail is None]

    def clean(self, cleaner: TitleCleaner):
        """Makes captions of the titles."""
        kept = []
        for product, title in tqdm(self.kept, unit="title", desc="cleaning"):
            try:
                caption = cleaner(title)
            except TitleDropped as error:
                self.dropped.setdefault(error.reason, []).append((product, error.detail))
                continue
            kept.append((product, caption))
            if caption != cleaner.normalize(title):
                self.cut.add(kept[-1])
        self.kept = kept

    def drop_duplicates(self):
        """Drops products whose image and caption an earlier one has, or whose caption, where none has an image."""
        pairs = [(canonical_image_id(product.image_id or ""), caption) for product, caption in self.kept]
        places = duplicates_of_earlier(pairs)
        self.drop(
            "duplicate",
            [None if place is None else f"as product {self.kept[place][0].product_id}" for place in places],
        )

    def report(self) -> dict[str, Any]:
        """Numbers and examples."""

        def describe(items: Sequence[tuple[Product, str]], what: str) -> dict[str, Any]:
            examples = draw_examples(items, NUM_EXAMPLES, lambda item: f"{item[0].product_id} {item[0].title}")
            described = []
            for product, text in examples:
                described.append(
                    {"product_id": product.product_id, "title": product.title} | ({what: text} if text else {})
                )
            return {"products": len(items), "examples": described}

        return {
            "products": len(self.kept) + sum(map(len, self.dropped.values())),
            "kept": describe([item for item in self.kept if item not in self.cut], "caption"),
            "cut": describe([item for item in self.kept if item in self.cut], "caption"),
            "dropped": {
                reason: {"meaning": REASONS[reason], **describe(self.dropped[reason], "detail")}
                for reason in REASONS
                if reason in self.dropped
            },
        }

    def dropped_rows(self) -> list[dict[str, str | None]]:
        """All that are dropped, with the reasons."""
        return [
            {
                "product_id": product.product_id,
                "image_id": product.image_id,
                "title": product.title,
                "reason": reason,
                "detail": detail,
            }
            for reason in REASONS
            for product, detail in self.dropped.get(reason, [])
        ]


def write_report(folder: Path, report: Mapping[str, Any], ledger: Ledger):
    """Writes `dropped.jsonl`, and then `report.json`."""
    write_json_lines(folder / "dropped.jsonl", ledger.dropped_rows())
    write_json(folder / "report.json", report)


def clean_products(args: argparse.Namespace) -> tuple[Ledger, dict[str, Any]]:
    """The products with their captions, and the settings that decide on them."""
    spam_filter, spam_settings = make_spam_filter(args)
    cleaner = TitleCleaner(args.max_characters, args.normalize_width, args.to_simplified, spam_filter)
    required = ["product_id", "title"]
    if args.regions:
        required += ["image_id", "category"] if args.pretrain_categories else ["image_id"]
    columns = {name: getattr(args, f"{name}_column") for name in PRODUCT_FIELDS}
    products = read_products(args.products, columns, args.columns, required)

    ledger = Ledger([(product, product.title) for product in products])
    if args.regions and args.pretrain_categories:
        wanted = {*args.pretrain_categories, *args.finetune_categories}
        known = Counter(product.category for product in products if product.category is not None)
        unknown = sorted(wanted - set(known))
        if unknown:
            common = ", ".join(category for category, _ in known.most_common(20))
            raise ValueError(
                f"{args.products}: expected categories that products have, such as {common}, got {unknown}."
            )
        ledger.drop(
            "other category",
            [None if product.category in wanted else product.category or "" for product in products],
        )
    ledger.clean(cleaner)

    settings = {"products": f"{Path(args.products).name} (sha256 {file_digest(args.products)})"}
    names = ("columns", *(f"{name}_column" for name in PRODUCT_FIELDS), "max_characters", "normalize_width")
    settings |= {name: getattr(args, name) for name in (*names, "to_simplified") if getattr(args, name)}
    return ledger, settings | spam_settings


# ---------------------------------------------------------------- titles alone


def write_titles(args: argparse.Namespace) -> dict[str, Any]:
    """Writes `titles.jsonl`, and the reports."""
    folder = Path(args.destination)
    names = ("titles.jsonl", "dropped.jsonl", "report.json")
    ours = {f"{name}{ending}" for name in names for ending in ("", ".unfinished")}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= ours):
        raise FileExistsError(f"{folder}: expected a new or empty folder, or one with cleaned titles, got another.")
    ledger, settings = clean_products(args)
    ledger.drop_duplicates()
    report = {"script": TitlePlan.script, "settings": settings, **ledger.report()}
    report_path = folder / "report.json"
    if report_path.exists() and read_json(report_path).get("settings") != settings:
        raise FileExistsError(f"{folder} has titles that were cleaned with other settings: choose another folder.")
    rows = []
    for product, caption in ledger.kept:
        row = {"product_id": product.product_id, "title": product.title, "caption": caption}
        further = {"image_id": product.image_id, "category": product.category}
        rows.append(row | {name: value for name, value in further.items() if value is not None})
    write_json_lines(folder / "titles.jsonl", rows)
    write_report(folder, report, ledger)
    return report


# ---------------------------------------------------------------- region datasets


@dataclass
class TitlePlan(Plan):
    """One split."""

    script = "build_title_dataset.py"

    def make_texts(self, work_dir: Path, num_proc: int) -> tuple[Mapping[str, Mapping[str, list]], list[str]]:
        note = (
            f"`{self.settings['caption_column']}` are titles of products, of at most {self.settings['max_characters']} "
            f"characters, from `{self.settings['products']}`."
        )
        if self.settings["confidence_above"] >= 0:
            note += f" Regions have a score above {self.settings['confidence_above']}."
        return self.texts, [note]


def build_dataset(args: argparse.Namespace) -> dict[str, Any]:
    """Writes what is still missing of the splits, and the report."""
    DatasetFolder(Path(args.destination), "train")  # a folder that cannot be written to shows at once
    image_sizes = None if args.image_sizes is None else read_image_sizes(args.image_sizes)
    source = open_source(args.regions, args.source_split, image_sizes=image_sizes, token=args.hub_token)
    image_of = find_images(source)
    ledger, settings = clean_products(args)
    ledger.drop(
        "no regions",
        [None if image_of(product) is not None else product.image_id or "no image" for product, _ in ledger.kept],
    )
    ledger.drop_duplicates()
    finetune_images = {
        image_of(product)
        for product, _ in ledger.kept
        if not args.finetune_categories or product.category in args.finetune_categories
    }
    if args.finetune_categories:
        ledger.drop(
            "image of finetuning",
            [
                product.image_id
                if product.category not in args.finetune_categories and image_of(product) in finetune_images
                else None
                for product, _ in ledger.kept
            ],
        )
    texts = {name: {} for name in (args.caption_column, *FURTHER_COLUMNS)}
    for product, caption in ledger.kept:
        for column, text in zip(texts, (caption, product.product_id, product.category or ""), strict=True):
            texts[column].setdefault(image_of(product), []).append(text)
    if not any(product.category for product, _ in ledger.kept):
        del texts["categories"]

    make_converter = functools.partial(
        Converter,
        max_regions=args.max_regions,
        min_confidence=lowest_score(args.confidence_above),
        dtype=args.dtype,
        expects_sizes=args.image_sizes is not None,
        text_types=dict.fromkeys(texts, pa.list_(pa.string())),
    )
    groups = group_images(find_products(ledger, image_of), texts[args.caption_column])
    splits, left_out = split_images(
        args, source, texts[args.caption_column], groups, finetune_images, make_converter(source)
    )
    ledger.drop("like a held-out image", [left_out.get(image_of(product)) for product, _ in ledger.kept])
    settings |= make_settings(args, source)
    check_folder(Path(args.destination), splits, settings)
    repo_id = create_repository(args) if args.push_to_hub else None
    reports = {}
    for split, image_ids in splits.items():
        part = part_of(source, image_ids)
        reports[split] = convert_to_parquet(
            argparse.Namespace(**{**vars(args), "split": split}),
            TitlePlan(
                source=part,
                converter=make_converter(part),
                image_ids=image_ids,
                missing={},
                texts=texts,
                not_in_source={},
                settings=settings | {"source_fingerprint": part.fingerprint()},
            ),
        )
    for report in reports.values():
        for reason, messages in report["missing"].items():
            ledger.drop(reason, [messages.get(image_of(product)) for product, _ in ledger.kept])
    report = {
        "script": TitlePlan.script,
        "settings": settings,
        **ledger.report(),
        "images_without_a_product": len(source) - len(texts[args.caption_column]),
        "splits": {
            split: {"images": report["images_out"], "regions": report["regions"], "texts": report["texts"]}
            for split, report in reports.items()
        },
    }
    write_report(Path(args.destination), report, ledger)
    if repo_id is not None:
        args.split = ", ".join(splits)
        print(f"Uploaded: {push_dataset(args, repo_id)}")
    return report


def find_images(source: RegionSource) -> Callable[[Product], str | None]:
    """Which image of the source a product has, whichever of its names the product gives."""
    image_ids: dict[str, str] = {}  # by canonical id
    for image_id in source.image_ids:
        image_ids.setdefault(canonical_image_id(image_id), image_id)
    return lambda product: None if product.image_id is None else image_ids.get(canonical_image_id(product.image_id))


def find_products(ledger: Ledger, image_of: Callable[[Product], str | None]) -> dict[str, list[str]]:
    """The product ids of each image, also of images without regions, and by rows that were dropped."""
    products: dict[str, list[str]] = {}
    for product, _ in (*ledger.kept, *(item for items in ledger.dropped.values() for item in items)):
        if product.image_id is not None:
            image_id = image_of(product) or canonical_image_id(product.image_id)
            products.setdefault(image_id, []).append(product.product_id)
    return products


def check_folder(path: Path, splits: Collection[str], settings: Mapping[str, Any]):
    """
    Compares what is to be made with all that was made or begun there. Which images a split has depends on the others.

    Raises:
        ValueError: a split was made with other settings, or there are others than these.
    """
    begun = {split: report["settings"] for split, report in DatasetFolder(path, "train").reports().items()}
    for settings_path in sorted(path.glob(".conversion/*/settings.json")):
        begun.setdefault(settings_path.parent.name, read_json(settings_path))
    for split, before in begun.items():
        # The fingerprint is of the images of the split, and is compared when it is its turn.
        DatasetFolder(path, split).is_complete({**settings, "source_fingerprint": before["source_fingerprint"]})
    others = [split for split in begun if split not in splits]
    if others:
        raise ValueError(
            f"{path}: expected a folder with no other splits than {', '.join(splits)}, got {', '.join(others)}. Choose "
            "another folder."
        )


def lowest_score(confidence_above: float) -> np.float32 | None:
    """The lowest score that is kept. Scores are float32; None keeps all regions."""
    return None if confidence_above < 0 else np.nextafter(np.float32(confidence_above), np.float32(np.inf))


def make_settings(args: argparse.Namespace, source: RegionSource) -> dict[str, Any]:
    """All that decides on the rows and the files beyond the titles, by the names of the arguments."""
    settings = {
        "source": [Path(name).resolve().name for name in args.regions],
        "source_format": source.format_name,
    }
    if args.image_sizes is not None:
        settings["image_sizes"] = f"{Path(args.image_sizes).name} (sha256 {file_digest(args.image_sizes)})"
    names = ("source_split", "confidence_above", "max_regions", "dtype", "pretrain_categories", "finetune_categories")
    names += ("validation_size", "test_size", "seed", "caption_column", "rows_per_shard")
    return settings | {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def part_of(source: RegionSource, image_ids: Sequence[str]) -> RegionSource:
    """A source with some of the images."""
    part = copy.copy(source)
    part.image_ids = list(image_ids)
    part.duplicate_ids = sorted(set(source.duplicate_ids) & set(image_ids))
    return part


def split_images(
    args: argparse.Namespace,
    source: RegionSource,
    captions: Mapping[str, Sequence[str]],
    groups: Sequence[Sequence[str]],
    finetune_images: set[str],
    converter: Converter,
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """
    Draws the images that are held out.

    Args:
        captions: Those of each image that has any.
        groups: Images such that none is like one of another group. At most one of each is held out.
        finetune_images: Those that are not for pretraining.
        converter: Tells whether an image has a region that is kept: so many are held out as was asked for.

    Returns:
        The images of each split, in the order of the source; and of those that are in none, as they are like one that
        is held out, which one that is.

    Raises:
        ValueError: there are too few images, or an image is damaged or invalid and `--on_error` is "raise".
    """
    in_order = [image_id for image_id in source.image_ids if image_id in captions]
    if not in_order:
        raise ValueError(
            f"No product is left that has a title and regions. Images of regions are such as {source.image_ids[:2]}."
        )
    if converter.min_confidence is not None:
        probe = Converter(source)
        probe.begin(in_order, "parquet", args.on_error)
        if not {"class_scores", "class_probs"} & set(probe.layout):
            raise ValueError(
                f"--confidence_above needs regions with class_scores or class_probs, got {', '.join(probe.layout)}. "
                "With -1, all are kept."
            )
    converter.begin(in_order, "parquet", args.on_error)
    places = {image_id: place for place, image_id in enumerate(source.image_ids)}

    def find_usable(image_ids: Sequence[str]) -> list[str]:
        usable = []
        # In the order of the source, so that no part of a file is read twice.
        for image_id in sorted(image_ids, key=places.get):
            try:
                converter[image_id]
            except NoRegionLeft:
                continue
            except ValueError as error:
                if args.on_error == "raise":
                    raise ValueError(f"{error} {SKIP_HINT}") from error
                continue
            usable.append(image_id)
        return usable

    number = args.validation_size + args.test_size
    candidates = [[image_id for image_id in group if image_id in finetune_images] for group in groups]
    held_out = draw_images(filter(None, candidates), number, args.seed, find_usable)
    split_of = dict.fromkeys(held_out[: args.test_size], "test")
    split_of |= dict.fromkeys(held_out[args.test_size :], "validation")
    left_out = {
        image_id: f"as {like} of {split_of[like]}"
        for group in groups
        for like in group
        if like in split_of
        for image_id in group
        if image_id != like and image_id in captions
    }
    splits: dict[str, list[str]] = {"pretrain": [], "train": [], "validation": [], "test": []}
    for image_id in in_order:
        if image_id not in left_out:
            split = "train" if image_id in finetune_images else "pretrain"
            splits[split_of.get(image_id, split)].append(image_id)
    if len(held_out) < number or not splits["train"]:
        raise ValueError(
            f"--validation_size and --test_size: expected {number:,} products to hold out and others to train on, got "
            f"{len(held_out):,} to hold out and {len(splits['train']):,} images of others. Products with an image or a "
            "title in common count as one, and those without a region that is kept do not count."
        )
    if args.pretrain_categories and not splits["pretrain"]:
        raise ValueError(
            f"Expected images to pretrain on, got none: all products of the categories {args.pretrain_categories} are "
            "dropped, or like products that are finetuned on or held out."
        )
    return {split: image_ids for split, image_ids in splits.items() if image_ids}, left_out


# ---------------------------------------------------------------- what has become of it


def format_report(report: Mapping[str, Any]) -> str:
    """A report for the terminal."""
    groups = {"kept whole": report["kept"], "kept and cut": report["cut"]}
    groups |= {f"dropped: {group['meaning']}": group for group in report["dropped"].values()}
    rows = [("products", report["products"])]
    rows += [(f"  {name}", group["products"]) for name, group in groups.items()]
    for split, part in report.get("splits", {}).items():
        rows += [(f"images of {split}", part["images"]), ("  regions", part["regions"])]
        rows.append(("  titles", part["texts"].get(report["settings"]["caption_column"], 0)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {number:>13,}" for name, number in rows]
    for name, group in groups.items():
        lines += ["", f"{name}, {len(group['examples'])} of {group['products']:,}:"] if group["examples"] else []
        for example in group["examples"]:
            line = f"  {example['product_id']}  {example['title']}"
            if example.get("caption", example["title"]) != example["title"]:
                line += f"  ->  {example['caption']}"
            lines.append(line + (f"  ({example['detail']})" if example.get("detail") else ""))
    return "\n".join(lines)


def main():
    parser, args = parse_args()
    try:
        report = write_titles(args) if args.titles_only else build_dataset(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped. The same command goes on where it was.\n")
    print(format_report(report))
    if not args.titles_only:
        print(f"\nNext: python examples/inspect_regions.py {args.destination} --split {next(iter(report['splits']))}")


if __name__ == "__main__":
    main()
