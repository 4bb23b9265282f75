from pathlib import Path

import datasets
import pytest
import torch
from model_fixtures import tiny_model
from transformers import BertTokenizer

from modeling_interbert import InterBERTForSequenceClassification
from processing.processing_interbert import InterBERTProcessor
from processing.tasks import GLUE_TASKS, GLUECollator, GLUEExample, read_glue, read_glue_dataset, split_glue

GLUE = Path(__file__).parents[2] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.exists(), reason="needs the GLUE sample")


def write(folder, *rows):
    path = folder / "x.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_cola_has_no_header(tmp_path):
    path = write(tmp_path, ["gj04", "1", "", 'They said "hi".'], ["gj04", "0", "*", "They drank the pub."])
    assert read_glue(path, "cola") == [
        GLUEExample('They said "hi".', label=1),
        GLUEExample("They drank the pub.", label=0),
    ]
    # The test file has one, and no labels.
    path = write(tmp_path, ["index", "sentence"], ["0", "Bill whistled."])
    assert read_glue(path, "cola") == [GLUEExample("Bill whistled.")]


def test_sst2(tmp_path):
    path = write(tmp_path, ["sentence", "label"], ["contains no wit ", "0"], ["a gem", "1"])
    assert read_glue(path, "sst2") == [GLUEExample("contains no wit ", label=0), GLUEExample("a gem", label=1)]


def test_rte_writes_its_labels_by_name(tmp_path):
    header = ["index", "sentence1", "sentence2", "label"]
    path = write(tmp_path, header, ["0", "It rains.", "It is dry.", "not_entailment"], ["1", "a", "b", "entailment"])
    assert read_glue(path, "rte") == [GLUEExample("It rains.", "It is dry.", 1), GLUEExample("a", "b", 0)]
    path = write(tmp_path, header[:3], ["0", "It rains.", "It is dry."])
    assert read_glue(path, "rte") == [GLUEExample("It rains.", "It is dry.")]


def test_stsb_in_both_layouts(tmp_path):
    header = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
    path = write(tmp_path, header, ["0", "g", "f", "2012", "1", "s", "s", "A plane.", "An air plane.", "4.750"])
    assert read_glue(path, "stsb") == [GLUEExample("A plane.", "An air plane.", 4.75)]
    path = write(tmp_path, header[:-1], ["0", "g", "f", "2012", "1", "s", "s", "A plane.", "An air plane."])
    assert read_glue(path, "stsb") == [GLUEExample("A plane.", "An air plane.")]
    path.write_text("main\tMSRvid\t2012\t0001\t5.000\tA.\tB.\r\nmain\thl\t2016\t0012\t0\tC.\tD.\tsource\tsource\r\n")
    assert read_glue(path, "stsb") == [GLUEExample("A.", "B.", 5.0), GLUEExample("C.", "D.", 0.0)]


@pytest.mark.parametrize(
    "task, rows, message",
    [
        (
            "rte",
            [["sentence1", "label"], ["a", "entailment"]],
            r"line 2: expected the field 'sentence2', got \['sentence1",
        ),
        (
            "rte",
            [["sentence1", "sentence2"], ["a"]],
            r"line 2: expected 2 columns, \['sentence1', 'sentence2'\], got 1",
        ),
        ("rte", [["sentence1", "sentence2", "label"], ["a", "b", "2"]], r"line 2: .* \['entailment', .*'1'\], got '2'"),
        (
            "cola",
            [["gj04", "1", "", "a"], ["gj04", "2", "", "b"]],
            r"line 2: .* labels \['unacceptable', .*\], got '2'",
        ),
        ("cola", [["gj04", "1", "a"]], r"line 1: expected the 4 columns \('source', .*\), got 3"),
        ("stsb", [["g", "f", "y", "0", "5.1", "a", "b"]], r"line 1: expected a score from 0 to 5, got '5.1'"),
        ("stsb", [["g", "f", "y", "0", "high", "a", "b"]], r"line 1: expected a score from 0 to 5, got 'high'"),
        ("stsb", [["g", "f", "y", "0", "1", "a", "b", "c"]], r"line 1: expected the 7 or 9 columns .*, got 8"),
        ("mnli", [["sentence1"]], r"one of \['cola', 'sst2', 'stsb', 'rte'\], got 'mnli'"),
    ],
)
def test_faulty_files(tmp_path, task, rows, message):
    with pytest.raises(ValueError, match=message):
        read_glue(write(tmp_path, *rows), task)


def test_datasets():
    dataset = datasets.Dataset.from_dict(
        {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, -1], "idx": [0, 1]}
    )
    labels = datasets.ClassLabel(names=["entailment", "not_entailment"])
    dataset = dataset.cast_column("label", labels)
    assert read_glue_dataset(dataset, "rte") == [GLUEExample("a", "b", 1), GLUEExample("c", "d")]
    dataset = datasets.Dataset.from_dict({"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [0.0, 3.25]})
    assert read_glue_dataset(dataset, "stsb") == [GLUEExample("a", "b", 0.0), GLUEExample("c", "d", 3.25)]
    dataset = datasets.Dataset.from_dict({"sentence": ["a"], "label": [0]})
    assert read_glue_dataset(dataset, "cola") == [GLUEExample("a", label=0)]
    with pytest.raises(ValueError, match=r"row 0: expected the field 'sentence1', got \['sentence', 'label'\]"):
        read_glue_dataset(dataset, "rte")


def test_held_out_examples_share_no_sentence_with_the_others():
    phrases = [
        "a film of great charm",  # part of the next one, and that of the one after it
        "this is a film of great charm",
        "this is a film of great charm and wit",
        "A film of  great charm",
        "a film",  # too short to say that it is from the same sentence
        "an unhappy story of love",
        "of love and hate",  # no part of the one before it: "of love" alone is
    ]
    groups = [{0, 1, 2, 3}, {4}, {5}, {6}]
    examples = [GLUEExample(phrase, label=number) for number, phrase in enumerate(phrases)]
    for wanted in (1, 2, 3, 4, 5, 6):
        train, held_out = split_glue(examples, wanted / 7)
        numbers = {example.label for example in held_out}
        assert 1 <= len(numbers) <= wanted and len(train) == 7 - len(numbers)
        assert all(group <= numbers or not group & numbers for group in groups)
        # The order does not matter, and is kept.
        again = split_glue(examples[::-1], wanted / 7)
        assert again == (train[::-1], held_out[::-1])
    assert {example.label for example in split_glue(examples, 6.9 / 7)[1]} == set(range(7))


def test_pairs_with_a_common_sentence_stay_together():
    pairs = [("a", "b"), ("c", "a"), ("d", "e"), ("e", "f"), ("g", "h")]
    examples = [GLUEExample(*pair, label=number) for number, pair in enumerate(pairs)]
    for wanted in (1, 2, 3):
        numbers = {example.label for example in split_glue(examples, wanted / 5)[1]}
        assert 1 <= len(numbers) <= wanted
        assert (0 in numbers) == (1 in numbers) and (2 in numbers) == (3 in numbers)


def test_a_part_that_cannot_be_held_out():
    examples = [GLUEExample("a", label=0)] * 4
    with pytest.raises(ValueError, match=r"No group of examples .* as small as 0.5 of all, 2 of 4"):
        split_glue(examples, 0.5)
    with pytest.raises(ValueError, match="`fraction` must be between 0 and 1, got 1"):
        split_glue(examples, 1)


@needs_glue
def test_sst2_is_split_by_sentences():
    examples = read_glue(GLUE / "SST-2" / "train.tsv", "sst2")
    train, held_out = split_glue(examples, 0.015)
    assert len(held_out) == 1010 and len(train) == len(examples) - 1010
    trained = {tuple(example.sentence1.lower().split()) for example in train}
    parts = {words[i : i + n] for words in trained for n in range(4, len(words) + 1) for i in range(len(words) - n + 1)}
    for example in held_out:
        words = tuple(example.sentence1.lower().split())
        assert words not in trained and words not in parts
        own_parts = {words[i : i + n] for n in range(4, len(words) + 1) for i in range(len(words) - n + 1)}
        assert not own_parts & trained
    # Whole sentences, short phrases, and both classes are among them.
    positive = sum(example.label for example in held_out) / len(held_out)
    assert 0.45 < positive < 0.65 and max(len(example.sentence1.split()) for example in held_out) > 20


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    return InterBERTProcessor(BertTokenizer(str(vocabulary)))


def test_batches_of_classes_and_of_scores(processor):
    batch = GLUECollator(processor, "rte")([GLUEExample("a b", "c", 1), GLUEExample("d", "e", 0)])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [1, 0]
    assert tiny_model(InterBERTForSequenceClassification, num_labels=2)(**batch).loss > 0

    batch = GLUECollator(processor, "stsb")([GLUEExample("a", "c", 4.75), GLUEExample("d", "e", 0)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [4.75, 0]
    outputs = tiny_model(InterBERTForSequenceClassification, num_labels=GLUE_TASKS["stsb"].num_labels)(**batch)
    torch.testing.assert_close(outputs.loss, ((outputs.logits[:, 0] - batch["labels"]) ** 2).mean())


def test_single_sentences_test_splits_and_length(processor):
    batch = GLUECollator(processor, "cola", max_length=5)([GLUEExample("a b c d e f"), GLUEExample("g")])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 11, 3, 0, 0]]
    assert "labels" not in batch
    # The longer sentence is cut first.
    batch = GLUECollator(processor, "rte", max_length=8)([GLUEExample("a b c d e f", "g h", 0)])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 3, 11, 12, 3]]


@needs_glue
@pytest.mark.parametrize(
    "file, task, count, first, label_counts",
    [
        ("CoLA/train.tsv", "cola", 8551, 1, {0: 2528, 1: 6023}),
        ("CoLA/dev.tsv", "cola", 1043, 1, {0: 322, 1: 721}),
        ("RTE/train.tsv", "rte", 2490, 1, {0: 1249, 1: 1241}),
        ("RTE/dev.tsv", "rte", 277, 1, {0: 146, 1: 131}),
        ("SST-2/train.tsv", "sst2", 67349, 0, {0: 29780, 1: 37569}),
        ("STS-B/sts-train.csv", "stsb", 5749, 5.0, None),
        ("STS-B/sts-dev.csv", "stsb", 1500, 5.0, None),
    ],
)
def test_glue_files(file, task, count, first, label_counts):
    examples = read_glue(GLUE / file, task)
    labels = [example.label for example in examples]
    assert len(examples) == count
    assert labels[0] == first
    if label_counts is not None:
        assert {label: labels.count(label) for label in sorted(set(labels))} == label_counts
    else:
        assert min(labels) == 0 and max(labels) == 5
    for example in examples:
        assert example.sentence1 and "\t" not in example.sentence1 and not example.sentence1.endswith("\r")
        assert (example.sentence2 is None) == (task in ("cola", "sst2"))
