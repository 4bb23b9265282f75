#!/usr/bin/env python
"""
Recalls images for topics: every image of a region dataset whose match score with the topic is above a threshold (0.6 in
the paper), highest first. On a CPU, with what `python examples/quickstart.py` leaves behind:

    python examples/recall.py --model_name_or_path outputs/quickstart/model --dataset_name outputs/quickstart/scenes \\
        --split test --topic "a large red circle" "a ring" --output_file outputs/recall/scenes.jsonl \\
        --html outputs/recall/scenes.html

The same with a tiny model that has hardly been trained, and therefore the ten best images whatever their scores:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/run_pretrain.py --dataset_name outputs/tiny_scenes --output_dir outputs/tiny_pretrained \\
        --tokenizer_name outputs/tiny_scenes/tokenizer --config_overrides hidden_size=64,num_attention_heads=2,\\
vision_num_attention_heads=2,intermediate_size=128,vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,\\
num_vision_layers=1,pooler_size=64
    python examples/recall.py --model_name_or_path outputs/tiny_pretrained --dataset_name outputs/tiny_scenes \\
        --split test --topic "a large red circle" --threshold 0 --top_k 10 --output_file outputs/tiny_recall.csv

Many topics, one in each line of a file, by eight GPUs that share the images:

    accelerate launch --multi_gpu --mixed_precision bf16 examples/recall.py --model_name_or_path org/interbert-zh \\
        --dataset_name org/products --split train --topics topics.txt --threshold 0.6 \\
        --index_dir outputs/products.index --output_file outputs/products.parquet

What no topic has a say in is computed once for each image, and kept in the index, `--index_dir`. The next run takes it
from there, and goes on with it if this one was stopped; images that the dataset has no more leave the index, and those
whose regions have changed are embedded anew. An index that has none of the dataset's images is left alone. The output
is a table of `topic`, `rank` (from 1), `image_id` and `score`, as JSON lines, CSV or Parquet by the extension of its
file.
"""

import base64
import csv
import functools
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from arguments import parse_arguments
from files import write_json_lines, write_text
from image_index import update_index
from model_loading import ModelArguments, load_model
from modeling_interbert import ImageMatch, InterBERTForImageRetrieval, InterBERTRetriever
from pictures import UNREADABLE, Pictures, encode_thumbnail
from processing import RegionDataset, load_region_dataset
from processing.tasks.files import numbered_lines
from retrieval_evaluation import AUTOCAST_DTYPES
from training import set_up_logging

COLUMNS = ("topic", "rank", "image_id", "score")
THUMBNAIL_SIZE = 160  # pixels, the longer side
CONTACT_SHEET = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font-family: sans-serif; margin: 2em; }
.sheet { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; width: {{ size }}px; font-size: 80%; overflow-wrap: anywhere; }
.picture { height: {{ size }}px; display: flex; align-items: center; justify-content: center; background: #eee; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{%- for topic in topics %}
<h2>{{ topic.name }}</h2>
<p>{{ topic.num_matches }} images{% if topic.tiles | length < topic.num_matches %}, of which the best
{{ topic.tiles | length }} are shown{% endif %}</p>
<div class="sheet">
{%- for tile in topic.tiles %}
<figure>
<div class="picture">
{%- if tile.thumbnail %}<img src="data:image/jpeg;base64,{{ tile.thumbnail }}" alt="{{ tile.image_id }}">
{%- else %}no picture{% endif -%}
</div>
<figcaption>{{ loop.index }}. {{ tile.image_id }}<br>{{ "%.4f" | format(tile.score) }}</figcaption>
</figure>
{%- endfor %}
</div>
{%- endfor %}
</body>
</html>
"""


@dataclass
class RecallArguments:
    """Which images are recalled for which topics, and where they are written to."""

    model_name_or_path: str = HfArg(aliases=["--model"], help="InterBERT checkpoint with a match head and a processor.")
    dataset_name: str = HfArg(aliases=["--images"], help="Region dataset: a local folder or a Hub name.")
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of `--model_name_or_path` on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="validation", metadata={"help": "Split to recall from; slices work."})
    topic: list[str] | None = field(default=None, metadata={"help": "One or more topics."})
    topics: str | None = field(default=None, metadata={"help": "File of topics, one in each line."})
    threshold: float = field(
        default=0.6, metadata={"help": "Match score, from 0 to 1, that a recalled image is above (paper: 0.6)."}
    )
    top_k: int | None = field(default=None, metadata={"help": "At most so many images of each topic, the best ones."})
    output_file: str = field(default="recall.jsonl", metadata={"help": "Table to write: .jsonl, .csv or .parquet."})
    html: str | None = field(default=None, metadata={"help": "Contact sheet to write, with thumbnails inside."})
    html_top_k: int = field(default=60, metadata={"help": "Of each topic, so many images are on the contact sheet."})
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures that are named by their `image_id`, for the contact sheet. By default the "
            "pictures are those of the dataset's column `image`."
        },
    )
    index_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the embedded images. By default beside the output, with `.index`."},
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Topics are cut to this number of tokens. By default the processor's limit."}
    )
    max_regions: int | None = field(
        default=None,
        metadata={"help": "Of each image, at most so many regions are used. By default the processor's limit."},
    )
    batch_size: int = field(default=256, metadata={"help": "Pairs that a process scores at a time."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "By default what `accelerate launch` says, or float32.", "choices": list(AUTOCAST_DTYPES)},
    )

    def __post_init__(self):
        if (self.topic is None) == (self.topics is None):
            raise ValueError("Give topics by either `--topic` or `--topics`.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`--threshold` must be within [0, 1], got {self.threshold}.")
        for name in ("top_k", "html_top_k", "max_seq_length", "max_regions", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if Path(self.output_file).suffix not in WRITERS:
            raise ValueError(f"`--output_file` must end in {', '.join(WRITERS)}, got {self.output_file}.")
        if self.image_dir is not None and self.html is None:
            raise ValueError("`--image_dir` is for the contact sheet, `--html`.")
        if self.image_dir is not None and not Path(self.image_dir).is_dir():
            raise ValueError(f"`--image_dir` must be a folder of pictures, got {self.image_dir}.")


def read_topics(args: RecallArguments) -> list[str]:
    """
    The topics, each of them once.

    Raises:
        ValueError: a topic is empty, there is none, or the file cannot be read.
    """
    topics, source = args.topic, "`--topic`"
    if args.topics is not None:
        source = f"`--topics` {args.topics}"
        try:
            topics = [line for _, line in numbered_lines(args.topics)]
        except OSError as error:
            raise ValueError(f"{source}: expected a text file, {error}") from error
    topics = [topic.strip() for topic in topics]
    if not topics:
        raise ValueError(f"{source}: expected at least one topic, got none.")
    if "" in topics:
        raise ValueError(f"{source}: expected topics that are not empty, number {topics.index('') + 1} is.")
    return list(dict.fromkeys(topics))


# ---------------------------------------------------------------- output


def write_csv(path: Path, rows: Sequence[dict]):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_parquet(path: Path, rows: Sequence[dict]):
    schema = pa.schema(zip(COLUMNS, (pa.string(), pa.int64(), pa.string(), pa.float64()), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), unfinished)
    unfinished.replace(path)


WRITERS: dict[str, Callable] = {".jsonl": write_json_lines, ".csv": write_csv, ".parquet": write_parquet}


def write_matches(path: Path, topics: Sequence[str], matches: Sequence[Sequence[ImageMatch]]):
    """
    Writes a row for each image of each topic, complete or not at all.

    Args:
        path: Its extension is one of `WRITERS`.
        matches: Of each topic, the best first.
    """
    rows = [
        dict(zip(COLUMNS, (topic, rank, match.image_id, match.score), strict=True))
        for topic, found in zip(topics, matches, strict=True)
        for rank, match in enumerate(found, start=1)
    ]
    WRITERS[path.suffix](path, rows)


class Thumbnails:
    """
    Small pictures of images, by image id.

    Raises:
        ValueError: there are no pictures.
    """

    def __init__(self, regions: RegionDataset, image_dir: str | None):
        self.pictures = Pictures(regions, image_dir)
        if not self.pictures.are_at_hand:
            raise ValueError("`--html` needs pictures: expected a column `image` or `--image_dir`, got neither.")
        self.rows = {image_id: row for row, image_id in enumerate(regions.image_ids)}

    def read(self, image_id: str) -> str | None:
        """A JPEG file in base64; None where there is no picture, or none that can be read."""
        try:
            picture = self.pictures.open(self.rows[image_id])
        except UNREADABLE:
            return None
        if picture is None:
            return None
        return base64.b64encode(encode_thumbnail(picture, THUMBNAIL_SIZE)).decode()


def write_contact_sheet(
    path: Path,
    title: str,
    topics: Sequence[str],
    matches: Sequence[Sequence[ImageMatch]],
    thumbnails: Thumbnails,
    max_images: int,
) -> int:
    """
    Writes a page that needs no other file.

    Args:
        max_images: Of each topic.

    Returns:
        The number of images on the page that have no picture.
    """
    thumbnail = functools.cache(thumbnails.read)
    groups = [
        {
            "name": topic,
            "num_matches": len(found),
            "tiles": [{**match._asdict(), "thumbnail": thumbnail(match.image_id)} for match in found[:max_images]],
        }
        for topic, found in zip(topics, matches, strict=True)
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    write_text(path, environment.from_string(CONTACT_SHEET).render(title=title, topics=groups, size=THUMBNAIL_SIZE))
    return len({tile["image_id"] for group in groups for tile in group["tiles"] if tile["thumbnail"] is None})


def main():
    (args,) = parse_arguments((RecallArguments,), description="Recall the images of a region dataset for topics.")
    topics = read_topics(args)
    set_up_logging()
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while one prepares the dataset, or has more to score
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[waiting])
    with accelerator.local_main_process_first():
        regions = load_region_dataset(args.dataset_name, args.split, name=args.dataset_config_name)
    thumbnails = None if args.html is None else Thumbnails(regions, args.image_dir)
    model, processor = load_model(
        InterBERTForImageRetrieval,
        ModelArguments(model_name_or_path=args.model_name_or_path, model_revision=args.model_revision),
        [regions],
        must_be_trained=True,
    )
    output_file = Path(args.output_file)
    index_dir = args.index_dir or output_file.with_suffix(".index")
    retriever = InterBERTRetriever(
        model.to(accelerator.device),
        processor,
        folder=index_dir,
        batch_size=args.batch_size,
        max_length=args.max_seq_length,
        max_regions=args.max_regions,
        autocast_dtype=AUTOCAST_DTYPES[accelerator.mixed_precision],
        progress_bar=functools.partial(tqdm, disable=not accelerator.is_local_main_process),
        process_group=torch.distributed.group.WORLD if accelerator.num_processes > 1 else None,
    )

    start = time.perf_counter()
    source = f"`--dataset_name` {args.dataset_name}, `--split` {args.split}"
    report = update_index(retriever, regions, source)
    accelerator.print(
        f"{len(retriever):,} images in the index after {time.perf_counter() - start:.1f} s: {report.num_added:,} new, "
        f"{report.num_replaced:,} with other regions, {report.num_unchanged:,} as before; {report.num_removed:,} "
        f"removed; left out for lack of regions: {report.num_without_regions:,}; {accelerator.num_processes} "
        "process(es)."
    )
    start = time.perf_counter()
    matches = retriever.recall(topics, args.threshold, args.top_k)
    seconds = time.perf_counter() - start
    if accelerator.is_main_process:
        write_matches(output_file, topics, matches)
        for topic, found in zip(topics, matches, strict=True):
            print(f"{len(found):>9,}  {topic}")
        print(
            f"Images above {args.threshold} of {len(retriever):,}, for {len(topics):,} topic(s) in {seconds:.1f} s: "
            f"{output_file}"
        )
        if thumbnails is not None:
            title = f"{Path(args.dataset_name).name} ({args.split}), match scores above {args.threshold}"
            num_missing = write_contact_sheet(Path(args.html), title, topics, matches, thumbnails, args.html_top_k)
            print(f"Contact sheet: {args.html} (images without a picture: {num_missing:,})")
    accelerator.end_training()


if __name__ == "__main__":
    main()
