#!/usr/bin/env python
"""
Converts region features between the formats of the field; into a region dataset (sharded Parquet) unless the
destination is a file of another format. On a CPU, without a download:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/convert_regions.py outputs/tiny_scenes outputs/tiny_scenes.tsv --to lxmert_tsv --source_split train
    python examples/convert_regions.py outputs/tiny_scenes.tsv outputs/tiny_regions --rows_per_shard 50 \\
        --dtype float16 --min_confidence 0.2 --max_regions 4

Features of COCO with captions, without the photographs that Flickr30K tests on (by their ids in COCO, whose
`flickr_url` names them), from two files, by eight processes:

    python examples/convert_regions.py train2014_obj36.tsv val2014_obj36.tsv outputs/coco_regions --dtype float16 \\
        --captions dataset_coco.json --captions_split train+restval --exclude_images coco_ids_of_flickr30k.txt \\
        --on_error skip --num_proc 8 --push_to_hub

The same with questions; each split is converted by itself, into one folder:

    python examples/convert_regions.py val2014_obj36.tsv outputs/vqa_regions --split validation --dtype float16 \\
        --questions v2_OpenEnded_mscoco_val2014_questions.json --annotations v2_mscoco_val2014_annotations.json

A conversion into Parquet that was stopped goes on where it was when the same command is given again, and ends with the
same bytes. `conversion_report.json` says of each image that is missing why it is.
"""

import argparse
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from files import file_digest, write_json
from processing.region_formats import WRITERS
from processing.tasks import canonical_image_id, read_captions, read_questions
from processing.tasks.files import numbered_lines, read_json
from region_conversion import (
    SKIP_HINT,
    Converter,
    Counts,
    DatasetFolder,
    Shard,
    type_name,
    write_file,
    write_shards,
)
from region_sources import ByImage, RegionSource, open_source, read_image_sizes

FORMATS_BY_EXTENSION = {".lmdb": "vilbert_lmdb", ".hdf5": "hdf5", ".h5": "hdf5"}
ROWS_PER_SHARD = 3000
NUM_EXAMPLES = 3  # of many images, on the terminal
# Why an image of the source is not in the destination.
REASONS = {
    "excluded": "in --exclude_images",
    "no caption": "without a caption",
    "no question": "without a question",
    "damaged": "damaged",
    "invalid": "invalid",
    "no region left": "without a region of --min_confidence",
}


# ---------------------------------------------------------------- arguments


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description="Convert region features between the formats of the field.",
        epilog="What can be read: Parquet; the LMDBs of ViLBERT and tensorpack; the TSVs of bottom-up-attention and "
        "LXMERT; folders of UNITER's .npz and of MMF's .npy; HDF5. Image ids of different files are compared without "
        ".jpg and the like, and those of COCO by number.",
    )
    parser.add_argument(
        "source", nargs="+", help="File, folder, or dataset on the Hub; several are read one after the other."
    )
    parser.add_argument(
        "destination",
        help="Folder for Parquet, or the file of another format. Conversions into another format start over when they "
        "were stopped.",
    )
    parser.add_argument(
        "--to",
        choices=sorted(WRITERS),
        help="Format of the destination. By default vilbert_lmdb for .lmdb, hdf5 for .hdf5 and .h5, parquet otherwise.",
    )
    parser.add_argument("--source_split", help="Split of a source that is a region dataset, if it has several.")
    parser.add_argument("--dataset_config_name", help="Configuration of a source that is a region dataset.")

    images = parser.add_argument_group("images and regions")
    images.add_argument(
        "--max_regions", type=int, help="Keeps so many regions of each image, and stores the highest score first."
    )
    images.add_argument("--min_confidence", type=float, help="Leaves out regions with a lower score.")
    images.add_argument(
        "--image_sizes",
        help="Sizes of images for sources that have none: JSON {id: [width, height]}, CSV image_id,width,height, or "
        "COCO's JSON.",
    )
    images.add_argument(
        "--exclude_images",
        nargs="+",
        help="Leaves out the images of these files: an id in each line, or a JSON list. They are known by the ids that "
        "they have in the source: the same photograph under another id stays.",
    )
    images.add_argument(
        "--on_error",
        choices=["raise", "skip"],
        default="raise",
        help="Stops at the first damaged or invalid image, or leaves out all of them and reports them.",
    )

    texts = parser.add_argument_group("texts (Parquet)", "Images without any are left out.")
    texts.add_argument(
        "--captions",
        nargs="+",
        help="Captions by image id: JSON, JSONL, CSV, Karpathy's dataset_*.json, or Flickr's .token files.",
    )
    texts.add_argument("--captions_split", help="Only captions of this split of --captions, such as train+restval.")
    texts.add_argument("--caption_column", default="captions", help="Column for the captions.")
    texts.add_argument("--questions", nargs="+", help="Questions by image id: VQA's JSON, JSON, JSONL or CSV.")
    texts.add_argument("--annotations", nargs="+", help="VQA's annotations, one file for each of --questions.")
    texts.add_argument("--question_column", default="questions", help="Column for the questions.")
    texts.add_argument(
        "--keep_images_without_text", action="store_true", help="Keeps them, with an empty list, instead."
    )

    output = parser.add_argument_group("output (Parquet)")
    output.add_argument("--split", help="Split to write, beside those that are there. By default train.")
    output.add_argument(
        "--dtype", choices=["float16", "float32"], help="Of features and class_probs. By default as in the source."
    )
    add_output_arguments(output)
    args = parser.parse_args()
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def add_output_arguments(parser: Any):
    """Those of every script that writes region datasets; `parser` may be a group of arguments."""
    parser.add_argument(
        "--rows_per_shard", type=int, help=f"A file is for so many images of the source. By default {ROWS_PER_SHARD}."
    )
    parser.add_argument("--num_proc", type=int, help="Number of processes. By default 1.")
    parser.add_argument("--push_to_hub", action="store_true", help="Uploads the dataset to the Hub.")
    parser.add_argument("--hub_dataset_id", help="Repository to upload to. By default the name of the destination.")
    parser.add_argument("--hub_token", help="Token for the Hub, if not logged in.")


def check_args(args: argparse.Namespace):
    """Fills in what depends on the destination, and refuses what does not go together."""
    extension = Path(args.destination).suffix.lower()
    if args.to is None and extension == ".tsv":
        raise ValueError(
            "a .tsv can be one of two formats: expected --to bottom_up_tsv or --to lxmert_tsv, got neither"
        )
    if args.to is None and extension == ".parquet":
        raise ValueError(f"expected a folder for files of Parquet, got {args.destination}")
    args.to = args.to or FORMATS_BY_EXTENSION.get(extension, "parquet")
    if args.to != "parquet":
        for name in ("captions", "questions", "split", "dtype", "rows_per_shard", "num_proc", "push_to_hub"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for Parquet, got the format {args.to}")
    check_output_args(args)
    check_positive(args, "max_regions")
    if args.captions_split and not args.captions:
        raise ValueError("--captions_split goes with --captions, got no --captions")
    if args.annotations and len(args.annotations) != len(args.questions or []):
        raise ValueError(
            f"--annotations: expected a file for each of --questions, got {len(args.annotations)} for "
            f"{len(args.questions or [])}"
        )


def check_output_args(args: argparse.Namespace):
    """Fills in the defaults of the output, and refuses what cannot be."""
    args.split = args.split or "train"
    args.rows_per_shard = ROWS_PER_SHARD if args.rows_per_shard is None else args.rows_per_shard
    args.num_proc = 1 if args.num_proc is None else args.num_proc
    check_positive(args, "rows_per_shard", "num_proc")
    if not re.fullmatch(r"\w+(\.\w+)*", args.split):
        raise ValueError(f"--split: expected letters, digits, underscores and dots, got {args.split}")


def check_positive(args: argparse.Namespace, *names: str):
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")


# ---------------------------------------------------------------- what is to be converted


@dataclass
class Plan:
    """
    Which images become which records.

    Args:
        source: With all images.
        converter: Reads an image of it as it is to be written.
        image_ids: Those to convert, in order.
        missing: Images that are not to be converted, by reason.
        texts: Further columns, by image.
        not_in_source: Image ids that files of arguments name and the source does not have, by argument.
        settings: All that decides on the rows and the files.
    """

    source: RegionSource
    converter: Converter
    image_ids: list[str]
    missing: dict[str, list[str]]
    texts: Mapping[str, Mapping[str, list]]
    not_in_source: dict[str, list[str]]
    settings: dict[str, Any]

    script: ClassVar[str] = "convert_regions.py"

    def make_texts(self, work_dir: Path, num_proc: int) -> tuple[Mapping[str, Mapping[str, list]], list[str]]:
        """Further columns, by image, and what the user ought to know of them. What takes long is kept in `work_dir`,
        for the case that the conversion is stopped."""
        return self.texts, []

    def write_shards(self, shards: Sequence[Shard], on_error: str, num_proc: int, advance: Callable[[int], Any]):
        """Writes shards, see [`write_shards`]."""
        write_shards(shards, self.converter, on_error, num_proc, advance)


def make_plan(args: argparse.Namespace) -> Plan:
    image_sizes = None if args.image_sizes is None else read_image_sizes(args.image_sizes)
    source = open_source(args.source, args.source_split, args.dataset_config_name, image_sizes, args.hub_token)
    texts, text_types = read_texts(args)
    excluded = ByImage(dict.fromkeys(image_id for path in args.exclude_images or [] for image_id in read_ids(path)))

    reasons = {args.caption_column: "no caption", args.question_column: "no question"}
    image_ids, missing = [], {}
    for image_id in source.image_ids:
        lacking = [
            reasons[column] for column in texts if not args.keep_images_without_text and not texts[column].get(image_id)
        ]
        if image_id in excluded:
            missing.setdefault("excluded", []).append(image_id)
        elif lacking:
            missing.setdefault(lacking[0], []).append(image_id)
        else:
            image_ids.append(image_id)
    if not image_ids:
        counts = ", ".join(f"{len(ids):,} {REASONS[reason]}" for reason, ids in missing.items())
        named = [image_id for values in texts.values() for image_id in list(values)[:2]]
        raise ValueError(
            f"No image is left to convert: of {len(source):,} in the source, such as {source.image_ids[:2]}, {counts}."
            + (f" Texts are of images such as {named}." if named else "")
        )

    known = {canonical_image_id(image_id) for image_id in source.image_ids}
    named = {"exclude_images": excluded}
    named |= {"captions" if column == args.caption_column else "questions": texts[column] for column in texts}
    not_in_source = {name: [i for i in image_ids if i not in known] for name, image_ids in named.items()}
    converter = Converter(
        source,
        max_regions=args.max_regions,
        min_confidence=args.min_confidence,
        dtype=args.dtype,
        expects_sizes=args.image_sizes is not None,
        text_types=text_types,
    )
    return Plan(source, converter, image_ids, missing, texts, not_in_source, make_settings(args, source))


def read_ids(path: str) -> list[str]:
    """Image ids of a JSON list, or of the lines of any other file."""
    if Path(path).suffix.lower() != ".json":
        return [line.strip() for _, line in numbered_lines(path)]
    image_ids = read_json(path)
    if not isinstance(image_ids, list) or not all(isinstance(image_id, int | str) for image_id in image_ids):
        raise ValueError(f"{path}: expected a list of image ids, got {image_ids!r:.80}.")
    return [str(image_id) for image_id in image_ids]


def read_texts(args: argparse.Namespace) -> tuple[dict[str, ByImage], dict[str, pa.DataType]]:
    """Columns of captions and of questions, by image, and their types."""
    texts, types = {}, {}
    if args.captions:
        captions: dict[str, list[str]] = {}
        for path in args.captions:
            for image_id, values in read_captions(path, args.captions_split).items():
                captions.setdefault(image_id, []).extend(values)
        texts[args.caption_column] = ByImage(captions)
        types[args.caption_column] = pa.list_(pa.string())
    if args.questions:
        pairs = zip(args.questions, args.annotations or [None] * len(args.questions), strict=True)
        examples = [asdict(example) for paths in pairs for example in read_questions(*paths)]
        id_type = pa.int64() if all(isinstance(example["question_id"], int) for example in examples) else pa.string()
        questions: dict[str, list[dict[str, Any]]] = {}
        for example in examples:
            if id_type == pa.string():
                example["question_id"] = str(example["question_id"])
            questions.setdefault(example.pop("image_id"), []).append(example)
        columns = {"question_id": id_type, "question": pa.string(), "answers": pa.list_(pa.string())}
        columns |= {name: pa.string() for name in ("multiple_choice_answer", "question_type", "answer_type")}
        texts[args.question_column] = ByImage(questions)
        types[args.question_column] = pa.list_(pa.struct(list(columns.items())))
    return texts, types


def make_settings(args: argparse.Namespace, source: RegionSource) -> dict[str, Any]:
    """All that decides on the rows and the files, by the names of the arguments. Files are named by their contents."""
    settings = {
        "source": [Path(name).resolve().name for name in args.source],
        "source_format": source.format_name,
        "source_fingerprint": source.fingerprint(),
    }
    for name in ("image_sizes", "exclude_images", "captions", "questions", "annotations"):
        value = getattr(args, name)
        paths = [value] if isinstance(value, str) else value or []
        settings[name] = [f"{Path(path).name} (sha256 {file_digest(path)})" for path in paths]
    names = ("source_split", "dataset_config_name", "max_regions", "min_confidence", "captions_split")
    names += ("keep_images_without_text", "to")
    if args.to == "parquet":
        names += ("dtype", "rows_per_shard")
    settings |= {name: getattr(args, name) for name in names}
    if args.captions:
        settings["caption_column"] = args.caption_column
    if args.questions:
        settings["question_column"] = args.question_column
    return {name: value for name, value in settings.items() if value not in (None, [], False)}


# ---------------------------------------------------------------- conversion


def convert_to_file(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Writes a file, or LMDB folder, and a report beside it."""
    path = Path(args.destination)
    notes = plan.converter.begin(plan.image_ids, args.to, args.on_error)
    with tqdm(total=len(plan.image_ids), unit="image") as progress_bar:
        counts = write_file(path, args.to, plan.converter, plan.image_ids, args.on_error, progress_bar.update)
    report = make_report(plan, counts, notes)
    write_json(path.with_name(f"{path.name}.conversion_report.json"), report)
    return report


def convert_to_parquet(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Writes what is still missing of a split of a region dataset, its report and the card."""
    folder = DatasetFolder(Path(args.destination), args.split)
    with folder.lock():
        if not folder.is_complete(plan.settings):
            notes = plan.converter.begin(plan.image_ids, "parquet", args.on_error)
            columns = {column.name: type_name(column.type) for column in plan.converter.schema}
            folder.begin(plan.settings, columns)
            texts, notes_on_texts = plan.make_texts(folder.work_dir, args.num_proc)
            notes += notes_on_texts
            shards = folder.shards(plan.image_ids, args.rows_per_shard, texts)
            counts = write_missing_shards(args, plan, shards)
            files = {
                f"data/{shard.path.name}": {"images": part.images, "bytes": part.num_bytes, "sha256": part.sha256}
                for shard, part in zip(shards, counts, strict=True)
            }
            folder.finish(shards, make_report(plan, Counts.total(counts), notes, columns, files))
        if not folder.write_card(lambda reports: make_card(Path(args.destination).resolve().name, reports)):
            print("README.md has been edited, and is left as it is.")
        folder.remove_work()
        return folder.reports()[args.split]


def write_missing_shards(args: argparse.Namespace, plan: Plan, shards: list[Shard]) -> list[Counts]:
    """
    Writes the shards that there are not yet, and gives the counts of all.

    Raises:
        ValueError: an image is damaged or invalid, also one of an earlier start, and `--on_error` is "raise"; or no
            image at all could be written.
    """
    counts = [shard.finished_counts() for shard in shards]
    if args.on_error == "raise":
        for reason in ("damaged", "invalid"):
            for message in Counts.total([part for part in counts if part]).missing.get(reason, {}).values():
                raise ValueError(f"{message} {SKIP_HINT}")
    missing = [shard for shard, part in zip(shards, counts, strict=True) if part is None]
    num_images = sum(len(shard.image_ids) for shard in shards)
    num_kept = num_images - sum(len(shard.image_ids) for shard in missing)
    with tqdm(total=num_images, initial=num_kept, unit="image") as progress_bar:
        plan.write_shards(missing, args.on_error, args.num_proc, progress_bar.update)
    counts = [shard.finished_counts() for shard in shards]
    total = Counts.total(counts)
    if not total.images:
        reasons = ", ".join(f"{len(images):,} {REASONS[reason]}" for reason, images in total.missing.items())
        raise ValueError(f"No image of {num_images:,} is left: {reasons}.")
    return counts


# ---------------------------------------------------------------- what has become of it


def make_report(
    plan: Plan,
    counts: Counts,
    notes: list[str],
    columns: Mapping[str, str] | None = None,
    files: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """All that there is to say of a conversion, for `conversion_report.json`, the card and the terminal."""
    report = {
        "script": plan.script,
        "settings": plan.settings,
        "notes": notes,
        "images_in": len(plan.source),
        "images_out": counts.images,
        "regions": counts.regions,
        "fewest_regions": counts.fewest_regions,
        "most_regions": counts.most_regions,
        "texts": counts.texts,
        "missing": {**plan.missing, **counts.missing},
        "duplicates": plan.source.duplicate_ids,
        "not_in_source": plan.not_in_source,
    }
    if plan.source.region_detector is not None:
        report["region_detector"] = plan.converter.tighten(plan.source.region_detector)
    if files is not None:
        report |= {"columns": columns, "files": files}
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """A report for the terminal."""
    rows = [("images in the source", report["images_in"])]
    rows += [(f"  {REASONS[reason]}", len(images)) for reason, images in report["missing"].items()]
    rows += [("images written", report["images_out"]), ("regions", report["regions"]), *report["texts"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {number:>13,}" for name, number in rows]
    for reason in ("damaged", "invalid"):
        messages = list(report["missing"].get(reason, {}).values())
        lines += [f"{reason}: {message}" for message in messages[:NUM_EXAMPLES]]
        if len(messages) > NUM_EXAMPLES:
            lines.append(f"{reason}: {len(messages) - NUM_EXAMPLES:,} more")
    if report["duplicates"]:
        lines.append(f"More than once in the source, where the first record counts: {some(report['duplicates'])}.")
    for name, image_ids in report["not_in_source"].items():
        if image_ids:
            lines.append(f"In --{name}, but not in the source: {some(image_ids)}.")
    return "\n".join([*lines, *report["notes"]])


def some(image_ids: list[str]) -> str:
    """The number of images, and the first of them."""
    ids = ", ".join(image_ids[:NUM_EXAMPLES]) + (", …" if len(image_ids) > NUM_EXAMPLES else "")
    return f"{len(image_ids):,} {'image' if len(image_ids) == 1 else 'images'} ({ids})"


CARD = """---
pretty_name: {name}
tags:
- region-features
configs:
- config_name: default
  description: 'sha256 of the data files: {digest}'
  data_files:
{data_files}
---

# {name}

Regions that an object detector found in images, one row per image.

{splits}

| column | type |
|---|---|
{columns}

Boxes are x1, y1, x2, y2 in pixels, or shares of width and height where both of these are 1.

{origins}

`conversion_report.json` has all settings, the checksums of the files, and for every image of a source that is missing
here the reason.

```python
from processing import load_region_dataset

regions = load_region_dataset("{name}", "{split}")
```

Written by {scripts} of InterBERT.
"""


def make_card(name: str, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The README.md of a dataset with these splits. It changes whenever a data file does."""
    # `datasets` caches a local folder by its card.
    checksums = [file["sha256"] for report in reports.values() for file in report["files"].values()]
    texts = list(dict.fromkeys(column for report in reports.values() for column in report["texts"]))
    table = [["split", "images", "regions", "regions per image", *texts]]
    for split, report in reports.items():
        per_image = f"{report['fewest_regions']} to {report['most_regions']}"
        numbers = [f"{report['texts'].get(column, 0):,}" for column in texts]
        table.append([split, f"{report['images_out']:,}", f"{report['regions']:,}", per_image, *numbers])
    table.insert(1, ["---"] * len(table[0]))
    columns = next(iter(reports.values()))["columns"] if reports else {}
    return CARD.format(
        name=name,
        digest=hashlib.sha256("\n".join(checksums).encode()).hexdigest(),
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in reports),
        splits="\n".join(f"| {' | '.join(row)} |" for row in table),
        columns="\n".join(f"| `{column}` | `{kind}` |" for column, kind in columns.items()),
        origins="\n\n".join(describe_origin(split, report) for split, report in reports.items()),
        split=next(iter(reports), ""),
        scripts=", ".join(dict.fromkeys(f"`examples/{report['script']}`" for report in reports.values())),
    )


def describe_origin(split: str, report: Mapping[str, Any]) -> str:
    """What the split was made from, for the card."""
    settings = report["settings"]
    sources = ", ".join(f"`{name}`" for name in settings["source"])
    sentences = [f"**{split}**: from {sources} ({settings['source_format']})."]
    if "min_confidence" in settings:
        sentences.append(f"Regions have a score of at least {settings['min_confidence']}.")
    if "max_regions" in settings:
        sentences.append(f"Of each image at most {settings['max_regions']} regions are kept.")
    num_missing = report["images_in"] - report["images_out"]
    if num_missing:
        reasons = ", ".join(f"{len(images):,} {REASONS[reason]}" for reason, images in report["missing"].items())
        sentences.append(f"Of {report['images_in']:,} images {num_missing:,} are missing: {reasons}.")
    return "\n".join([*sentences, *report["notes"]])


# ---------------------------------------------------------------- upload


def create_repository(args: argparse.Namespace) -> str:
    """Creates the repository to upload to, before the conversion, so that a wrong name or token shows at once."""
    repo_id = args.hub_dataset_id or Path(args.destination).resolve().name
    return HfApi(token=args.hub_token).create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id


def push_dataset(args: argparse.Namespace, repo_id: str) -> str:
    """Uploads the dataset in one commit. Returns its URL."""
    commit = HfApi(token=args.hub_token).upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=args.destination,
        commit_message=f"Add the split {args.split}",
        ignore_patterns=[".conversion/**"],
    )
    return str(commit.commit_url)


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, make_plan: Callable[[argparse.Namespace], Plan]):
    """Converts, uploads, and reports on the terminal."""
    try:
        plan = make_plan(args)
        repo_id = create_repository(args) if args.push_to_hub else None
        report = convert_to_parquet(args, plan) if args.to == "parquet" else convert_to_file(args, plan)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped. The same command goes on where it was, or starts over for formats but Parquet.\n")
    print(format_report(report))
    if repo_id is not None:
        print(f"Uploaded: {push_dataset(args, repo_id)}")
    split = f" --split {args.split}" if args.to == "parquet" else ""
    print(f"Next: python examples/inspect_regions.py {args.destination}{split}")


def main():
    run(*parse_args(), make_plan)


if __name__ == "__main__":
    main()
