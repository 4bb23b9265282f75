"""Writes questions about generated scenes in VCR's file format: what colour an object has, four answers, and four
rationales, which name the colour of a second object beside it. An annotation speaks of objects by their numbers.

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/generate_vcr.py outputs/tiny_scenes outputs/tiny_vcr

OUTPUT_DIR/{train,val,test}.jsonl are the annotations, without labels in the test split, and OUTPUT_DIR/vcr1images what
annotators are shown of the images: boxes and classes (the shapes). The same arguments give the same bytes.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files import write_json_lines
from generate_scenes import COLOURS, KINDS
from processing import RegionDataset, load_region_dataset
from processing.tasks.vcr import NUM_CHOICES

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # of the scenes: name of VCR's file
LABELS = ("answer_label", "rationale_label")

Tokens = list[str | list[int]]


def choose_colours(rng: random.Random, right: str, also_right: set[str]) -> tuple[list[str], int]:
    """Four colours in random order, of which one is right, and its number."""
    wrong = [colour for colour in COLOURS if colour != right and colour not in also_right]
    colours = rng.sample([right, *rng.sample(wrong, NUM_CHOICES - 1)], NUM_CHOICES)
    return colours, colours.index(right)


def annotate(rng: random.Random, kinds: list[tuple[str, str]], first: int, second: int) -> dict[str, Any]:
    """
    A question about one object, whose rationales speak of another one, too.

    Args:
        kinds: Colour and shape of every object.
    """

    def choices(number: int) -> tuple[list[str], int]:
        colour, shape = kinds[number]
        # Words tell objects apart by their shapes: no colour of another object of this shape is wrong.
        return choose_colours(rng, colour, {other for other, other_shape in kinds if other_shape == shape})

    answers, answer_label = choices(first)
    rationales, rationale_label = choices(second)
    question: Tokens = ["what", "colour", "is", [first], "?"]
    answer_choices: list[Tokens] = [[[first], "is", colour, "."] for colour in answers]
    rationale_choices: list[Tokens] = [
        [[first], "is", kinds[first][0], "and", [second], "is", colour, "."] for colour in rationales
    ]
    return {
        "objects": [shape for _, shape in kinds],
        "question": question,
        "answer_choices": answer_choices,
        "answer_label": answer_label,
        "rationale_choices": rationale_choices,
        "rationale_label": rationale_label,
    }


def annotate_split(regions: RegionDataset, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Annotation and metadata of every scene, under their names in VCR."""
    for number in range(len(regions)):
        record = regions[number]
        image_id = record["image_id"]
        rng = random.Random(image_id)
        kinds = [KINDS[class_id] for class_id in record["class_ids"]]
        # Of two shapes: then there are at least three wrong colours for each, and words that tell both apart.
        pairs = [pair for pair in itertools.permutations(range(len(kinds)), 2) if len({kinds[i][1] for i in pair}) == 2]
        if not pairs:
            continue
        first, second = rng.choice(pairs)
        annotation = {
            "annot_id": f"{name}-{number}",
            "img_id": image_id,
            "img_fn": f"scenes/{image_id}.png",
            "metadata_fn": f"scenes/{image_id}.json",
            "movie": "scenes",
            "question_number": 0,
        } | annotate(rng, kinds, first, second)
        boxes = [
            [*map(float, box), float(score)] for box, score in zip(record["boxes"], record["class_scores"], strict=True)
        ]
        metadata = {
            "boxes": boxes,
            "segms": [[] for _ in boxes],
            "names": [shape for _, shape in kinds],
            "width": record["width"],
            "height": record["height"],
        }
        yield annotation, metadata


def write_vcr(scenes: str | Path, output_dir: str | Path):
    """Writes the annotations of all splits of generated scenes, and the metadata of their images."""
    output_dir = Path(output_dir)
    for split, name in SPLITS.items():
        annotations = []
        for annotation, metadata in annotate_split(load_region_dataset(scenes, split), name):
            path = output_dir / "vcr1images" / annotation["metadata_fn"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(metadata), encoding="utf-8")
            if name == "test":
                annotation = {key: value for key, value in annotation.items() if key not in LABELS}
            annotations.append(annotation)
        write_json_lines(output_dir / f"{name}.jsonl", annotations)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("scenes", type=Path, help="Folder of generate_scenes.py.")
    parser.add_argument("output_dir", type=Path, help="Folder that is written.")
    args = parser.parse_args()
    write_vcr(args.scenes, args.output_dir)
    print(f"{', '.join(f'{name}.jsonl' for name in SPLITS.values())} and vcr1images are in {args.output_dir}.")


if __name__ == "__main__":
    main()
