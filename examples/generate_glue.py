"""Generates small tasks in the files of GLUE's CoLA, SST-2, STS-B and RTE, which a tiny model learns in a minute:
sentences without a verb, praise and blame, two descriptions of an object, and what one says about the other.

    python examples/generate_glue.py outputs/tiny_glue

SST-2 has no dev.tsv, so that a part of its training data is to be held out. `bert/` holds a BERT to start from, with
random weights and a tokenizer of the words. The same arguments give the same bytes.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from files import write_text
from processing.tasks import GLUE_TASKS

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "grey")
SHAPES = ("circle", "square", "star", "ring")
PLACES = ("on the left", "on the right", "in the middle", "at the top", "at the bottom", "in a corner")
PRAISE = ("wonderful", "funny", "clever")
BLAME = ("dull", "clumsy", "tiresome")
KINDS = ("film", "story", "comedy")
CONNECTIONS = ("and rather", "and sometimes even", "and always", "or at least")
FRAME = "a is . the there but this that"


def object_words(rng: random.Random) -> list[str]:
    """Size, colour and shape."""
    return [rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)]


def cola_row(rng: random.Random, number: int) -> list[str]:
    """Unacceptable is what lacks the verb."""
    is_acceptable = rng.random() < 0.5
    sentence = ["the", *object_words(rng), *(["is"] if is_acceptable else []), rng.choice(PLACES), "."]
    return ["made", str(int(is_acceptable)), "" if is_acceptable else "*", " ".join(sentence)]


def sst2_row(rng: random.Random, number: int) -> list[str]:
    is_positive = rng.random() < 0.5
    words = PRAISE if is_positive else BLAME
    sentence = f"{rng.choice(('a', 'this', 'that'))} {rng.choice(words)} {rng.choice(CONNECTIONS)} {rng.choice(words)}"
    return [f"{sentence} {rng.choice(KINDS)} {rng.choice(PLACES)}", str(int(is_positive))]


def stsb_row(rng: random.Random, number: int) -> list[str]:
    """The score says how much is the same: 2 of 5 for the colour, 3 for the shape."""
    _, colour, shape = object_words(rng)
    other_colour = colour if rng.random() < 0.5 else rng.choice(COLOURS)
    other_shape = shape if rng.random() < 0.5 else rng.choice(SHAPES)
    score = 2 * (colour == other_colour) + 3 * (shape == other_shape)
    sentences = [f"there is a {colour} {shape} {rng.choice(PLACES)} .", f"a {other_colour} {other_shape}"]
    return [str(number), "made", "made", "2020", str(number), "made", "made", *sentences, f"{score:.3f}"]


def rte_row(rng: random.Random, number: int) -> list[str]:
    """The hypothesis follows if it has the colour of the object."""
    words = object_words(rng)
    is_entailed = rng.random() < 0.5
    colour = words[1] if is_entailed else rng.choice([colour for colour in COLOURS if colour != words[1]])
    premise = f"there is a {' '.join(words)} {rng.choice(PLACES)} ."
    return [str(number), premise, f"the {words[2]} is {colour} .", "entailment" if is_entailed else "not_entailment"]


STSB_HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
# Task -> header, and a row from its number
TASKS: dict[str, tuple[list[str], Callable[[random.Random, int], list[str]]]] = {
    "cola": (["source", "label", "note", "sentence"], cola_row),
    "sst2": (["sentence", "label"], sst2_row),
    "stsb": (STSB_HEADER, stsb_row),
    "rte": (["index", "sentence1", "sentence2", "label"], rte_row),
}


MAX_DRAWS = 20  # for each training example, until one is not validated


def write_rows(path: Path, rows: list[list[str]]):
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))


def write_task(folder: Path, task: str, num_train: int, num_validation: int, num_test: int, rng: random.Random):
    """
    Files of one task, as GLUE has them: CoLA's have no header where they have labels, those to predict for do. What is
    validated is not trained on.

    Raises:
        ValueError: hardly any sentence is left to train on.
    """
    header, make_row = TASKS[task]
    columns = GLUE_TASKS[task].sentence_columns

    def sentences_of(row: list[str]) -> list[str]:
        return [row[header.index(column)] for column in columns]

    validation_rows = [make_row(rng, number) for number in range(num_validation)]
    validated = [sentences_of(row) for row in validation_rows]
    train_rows: list[list[str]] = []
    for _ in range(MAX_DRAWS * num_train):
        if len(train_rows) == num_train:
            break
        row = make_row(rng, len(train_rows))
        if sentences_of(row) not in validated:
            train_rows.append(row)
    else:
        raise ValueError(
            f"{GLUE_TASKS[task].title} has too few sentences to train on others than those of {num_validation:,} "
            "validation examples: give a smaller `--num_validation`."
        )
    for name, rows in (("train", train_rows), ("dev", validation_rows)):
        if (task, name) != ("sst2", "dev"):
            write_rows(folder / f"{name}.tsv", rows if task == "cola" else [header, *rows])
    test_rows = [[str(number), *sentences_of(make_row(rng, number))] for number in range(num_test)]
    write_rows(folder / "test.tsv", [["index", *columns], *test_rows])


def build_tokenizer() -> BertTokenizer:
    """A lower-casing BERT WordPiece tokenizer of all words."""
    texts = [*SIZES, *COLOURS, *SHAPES, *PLACES, *PRAISE, *BLAME, *KINDS, *CONNECTIONS, FRAME]
    words = dict.fromkeys(" ".join(texts).split())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}, do_lower_case=True)


def write_bert(folder: Path, seed: int):
    """A BERT of three layers. Weights of this size and no dropout make it learn within a few hundred steps."""
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_glue(folder: Path, num_train: int = 600, num_validation: int = 100, num_test: int = 20, seed: int = 0):
    """Writes the folders CoLA, SST-2, STS-B, RTE and bert."""
    for task in TASKS:
        rng = random.Random(f"{seed} {task}")
        write_task(folder / GLUE_TASKS[task].title, task, num_train, num_validation, num_test, rng)
    write_bert(folder / "bert", seed)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="Folder that is written.")
    parser.add_argument("--num_train", type=int, default=600, help="Number of training examples of each task.")
    parser.add_argument("--num_validation", type=int, default=100, help="Number of validation examples.")
    parser.add_argument("--num_test", type=int, default=20, help="Number of examples to predict for.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed gives the same bytes.")
    args = parser.parse_args()
    write_glue(args.output_dir, args.num_train, args.num_validation, args.num_test, args.seed)
    print(f"{', '.join(GLUE_TASKS[task].title for task in TASKS)} and a BERT are in {args.output_dir}.")


if __name__ == "__main__":
    main()
