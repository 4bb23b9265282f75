import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from model_fixtures import tiny_model
from transformers import BertTokenizer

from modeling_interbert import InterBERTForVQA
from processing.processing_interbert import InterBERTProcessor
from processing.region_dataset import RegionDataset, load_region_dataset
from processing.tasks import (
    ExamplesWithRegions,
    VQACollator,
    VQAExample,
    build_answer_vocabulary,
    normalize_answer,
    questions_of_dataset,
    read_answer_vocabulary,
    read_questions,
    soft_scores,
)
from processing.tasks.vqa import vqa_score

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the samples of real data")

# Questions


def question(question_id, image_id=1, text="what is it?"):
    return {"question_id": question_id, "image_id": image_id, "question": text}


def annotation(question_id, image_id=1, answers=("cat",) * 10, most_frequent="cat"):
    return {
        "question_id": question_id,
        "image_id": image_id,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(answers)],
        "multiple_choice_answer": most_frequent,
        "question_type": "what is",
        "answer_type": "other",
    }


def write_official(folder, questions, annotations):
    (folder / "questions.json").write_text(json.dumps({"questions": questions, "data_subtype": "train2014"}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations, "data_subtype": "train2014"}))
    return folder / "questions.json", folder / "annotations.json"


def test_official_questions_in_their_order_with_their_annotations(tmp_path):
    paths = write_official(
        tmp_path,
        [question(900, 9, "how many?"), question(420, 42)],
        [annotation(420, 42), annotation(900, 9, ["2"] * 7 + ["two"] * 3, "2")],
    )
    first, second = read_questions(*paths)
    assert first == VQAExample(900, "9", "how many?", ["2"] * 7 + ["two"] * 3, "2", "what is", "other")
    assert (second.question_id, second.image_id, second.answers) == (420, "42", ["cat"] * 10)


def test_a_test_split_has_no_annotations(tmp_path):
    path, _ = write_official(tmp_path, [question(900, 9, "how many?")], [])
    assert read_questions(path) == [VQAExample(900, "9", "how many?")]
    assert read_questions(path)[0].answers is None


@pytest.mark.parametrize(
    "questions, annotations, message",
    [
        (
            [question(1)],
            [annotation(1), annotation(2)],
            r"annotations\[1\]: expected the id of one of 1 questions, got 2",
        ),
        (
            [question(1)],
            [annotation(1), annotation(1)],
            r"annotations\[1\]: expected one annotation .*, got question 1 ag",
        ),
        ([question(1), question(2)], [annotation(2)], r"annotation for each of 2 questions, got none for 1: \[1\]"),
        ([question(1), question(1)], [], r"questions\[1\]: expected every question id once, got 1 again"),
        ([question(1, 42)], [annotation(1, 43)], r"annotations\[0\]: expected image '42' as in question 1, got '43'"),
        ([{"question_id": 1, "image_id": 1}], [], r"questions\[0\]: expected the field 'question', got"),
        ([question(1)], [{"question_id": 1, "image_id": 1}], r"annotations\[0\]: expected the field 'answers', got"),
        (
            [question(1)],
            [annotation(1) | {"answers": [{}]}],
            r"annotations\[0\], answers\[0\]: expected the field 'answer'",
        ),
    ],
)
def test_faulty_official_files(tmp_path, questions, annotations, message):
    with pytest.raises(ValueError, match=message):
        read_questions(*write_official(tmp_path, questions, annotations))


def test_files_given_the_wrong_way_round(tmp_path):
    paths = write_official(tmp_path, [question(1)], [annotation(1)])
    with pytest.raises(ValueError, match=r"annotations\.json: expected the field 'questions', got \['annotations'"):
        read_questions(*paths[::-1])
    (tmp_path / "list.jsonl").write_text(json.dumps(question(1)))
    with pytest.raises(ValueError, match="list.jsonl: expected VQA's official questions beside `annotations_path`"):
        read_questions(tmp_path / "list.jsonl", paths[1])


def test_lists_of_questions(tmp_path):
    expected = [
        VQAExample(10, "image3", "what is on the desk", ["book", "tape_dispenser"]),
        VQAExample(11, "image4", "what colour is it", ["red"], question_type="colour"),
        VQAExample(12, "image4", "why"),
    ]
    records = [
        # The list says more than the one answer beside it.
        question(10, "image3", "what is on the desk") | {"answers": ["book", "tape_dispenser"], "answer": "book"},
        question(11, "image4.png", "what colour is it") | {"answer": "red", "question_type": "colour"},
        question(12, "image4", "why") | {"answers": None},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "q.json").write_text(json.dumps(records))
    assert read_questions(tmp_path / "q.jsonl") == expected
    assert read_questions(tmp_path / "q.json") == expected
    (tmp_path / "q.csv").write_text("question_id,image_id,question,answer\n7,image3,why,no\n")
    assert read_questions(tmp_path / "q.csv") == [VQAExample("7", "image3", "why", ["no"])]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [records[0], records[0]])))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: expected every question id once, got 10 again"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text(json.dumps(records[0] | {"answers": "book"}))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1: expected 'answers' to be a list of strings, got 'book'"):
        read_questions(tmp_path / "q.jsonl")


# Answers


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Yes", "yes"),
        ("  a Dog\n", "dog"),
        # articles, number words
        ("the cat and an apple", "cat and apple"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("twenty-one", "twenty 1"),
        ("a", ""),
        # a mark between words becomes a space, one beside a space is removed everywhere
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("t-shirt - red", "tshirt red"),
        ("t-shirt -red", "tshirt red"),
        ("red\t-t-shirt", "red tshirt"),
        ("yes, it is", "yes it is"),
        ("red,white", "red white"),
        ("yes!", "yes"),
        ("(left)", "left"),
        ("ice_cream", "ice cream"),
        # a comma within a number takes all marks out
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        # periods go, but not before a digit
        ("3.5", "3.5"),
        (".5", ".5"),
        ("p.m.", "pm"),
        ("st. patrick's day", "st patrick's day"),
        ("5.", "5"),
        ("v1.2.", "v1.2"),
        # apostrophes, colons and signs stay
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("man's", "man's"),
        # contractions
        ("dont know", "don't know"),
        ("Cant", "can't"),
        ("it isnt", "it isn't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("theyre", "they're"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("its", "its"),
        ("Im", "im"),
        ("ill", "ill"),
    ],
)
def test_answer_normalization(answer, expected):
    assert normalize_answer(answer) == expected


def test_leave_one_out_scores():
    # 1 + 2 + 3 + 4 annotators. "cat": 1 of 9 gave it in 2 of the 10 sets, 2 of 9 in 8: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    answers = ["a dog"] + ["Cat"] * 2 + ["red."] * 3 + ["two", "2", "Two", "2"]
    assert soft_scores(answers) == pytest.approx({"dog": 0.3, "cat": 0.6, "red": 0.9, "2": 1.0})
    assert soft_scores(["yes"] * 10) == {"yes": 1.0}
    # Written out, as the evaluation goes about it.
    for answer, score in soft_scores(answers).items():
        normalized = [normalize_answer(other) for other in answers]
        sets = [normalized[:i] + normalized[i + 1 :] for i in range(10)]
        assert score == pytest.approx(sum(min(1, others.count(answer) / 3) for others in sets) / 10)


def test_count_and_listed_scores():
    answers = ["dog"] + ["cat"] * 2 + ["red"] * 3 + ["2"] * 4
    assert soft_scores(answers, "count") == pytest.approx({"dog": 1 / 3, "cat": 2 / 3, "red": 1.0, "2": 1.0})
    assert soft_scores(["stool", "stool", "yoga_mat"], "listed") == {"stool": 1.0, "yoga mat": 1.0}
    for scoring in ("leave_one_out", "count"):
        with pytest.raises(
            ValueError, match=f"scoring='{scoring}'` needs the answers of 10 annotators, got 1: choose 'l"
        ):
            soft_scores(["stool"], scoring)
    with pytest.raises(ValueError, match="one of .'leave_one_out', 'count', 'listed'., got 'soft'"):
        soft_scores(["stool"], "soft")


def test_the_official_score_compares_as_written_what_all_ten_wrote():
    shirts = ["t-shirt"] * 10
    assert [vqa_score(answer, shirts) for answer in ("t-shirt", " t-shirt\n", "t shirt", "T-shirt")] == [1, 1, 0, 0]
    # White space around an answer, and which, is nothing that annotators differ in.
    assert vqa_score("two\tcats.", ["two cats.", " two\ncats."] * 5) == 1
    # One of ten wrote another: all are normalized. Nine: 1; one: 0.3.
    differing = ["The shirt!"] + ["t-shirt"] * 9
    assert [vqa_score(answer, differing) for answer in ("t-shirt", "a t shirt", "shirt")] == [1, 1, pytest.approx(0.3)]
    assert [vqa_score("2", ["two"] * count + ["3"] * (10 - count)) for count in range(1, 6)] == pytest.approx(
        [0.3, 0.6, 0.9, 1, 1]
    )
    assert vqa_score("4", ["two"] * 5 + ["3"] * 5) == 0
    with pytest.raises(ValueError, match="answers of 10 annotators to every question, got 1"):
        vqa_score("two", ["two"])


def test_answers_of_at_least_nine_questions_make_the_vocabulary():
    def examples(answer, count):
        # The ten answers do not count, the most frequent one does.
        return [VQAExample(f"{answer}{i}", "1", "?", ["rare"] * 10, answer) for i in range(count)]

    questions = examples("red", 8) + examples("no", 9) + examples("two", 9) + examples("Yes", 5) + examples("yes.", 5)
    assert build_answer_vocabulary(questions) == {"yes": 0, "2": 1, "no": 2}
    assert build_answer_vocabulary(questions, min_occurrences=8) == {"yes": 0, "2": 1, "no": 2, "red": 3}
    # In a list each answer of a question counts once.
    lists = [VQAExample(1, "1", "?", ["stool", "stool"]), VQAExample(2, "1", "?", ["mat", "stool"])]
    assert build_answer_vocabulary(lists, min_occurrences=1) == {"stool": 0, "mat": 1}
    assert build_answer_vocabulary(lists, min_occurrences=2) == {"stool": 0}
    with pytest.raises(ValueError, match=r"of at least 3 questions, got none in 2 questions; most .* \[\('stool', 2\)"):
        build_answer_vocabulary(lists, min_occurrences=3)
    with pytest.raises(ValueError, match="needs questions with answers, got none for 3"):
        build_answer_vocabulary([*lists, VQAExample(3, "1", "?")])


def test_vocabulary_files(tmp_path):
    (tmp_path / "ans2label.json").write_text('{"no": 1, "yes": 0, "": 2}')
    (tmp_path / "label2ans.json").write_text('["yes", "no", ""]')
    (tmp_path / "answers.txt").write_text("yes\nno\nyoga_mat\n")
    assert read_answer_vocabulary(tmp_path / "ans2label.json") == {"yes": 0, "no": 1, "": 2}
    assert read_answer_vocabulary(tmp_path / "label2ans.json") == {"yes": 0, "no": 1, "": 2}
    assert read_answer_vocabulary(tmp_path / "answers.txt") == {"yes": 0, "no": 1, "yoga_mat": 2}
    for name, text, message in [
        (
            "gap.json",
            '{"yes": 0, "no": 2}',
            r"gap\.json: expected the labels 0 to 1, each once, got others at \[1, 2\]",
        ),
        ("text.json", '{"yes": "0", "no": 1}', r"text\.json: expected the labels 0 to 1, .* others at \['0', 0\]"),
        ("same.json", '{"yes": 0, "no": 0}', r"same\.json: expected the labels 0 to 1, each once, got others at \[1\]"),
        ("twice.txt", "yes\nno\nyes\n", r"twice\.txt: expected every answer once, got these more often: \['yes'\]"),
        ("numbers.json", "[1, 2]", r"numbers\.json: expected 'answers' to be a list of strings"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_answer_vocabulary(tmp_path / name)


# Batches

WIDTH = 6  # of the tiny model's features
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "?", "how", "many"]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return InterBERTProcessor(BertTokenizer(str(vocabulary)), region_feature_size=WIDTH)


def make_regions(questions=None):
    boxes = [[[0, 0, 5, 10]], [[0, 0, 10, 20], [1, 1, 2, 2], [1, 1, 3, 3]]]
    columns = {
        "image_id": ["1", "COCO_val2014_000000000042"],
        "width": pa.array([10, 10], pa.int32()),
        "height": pa.array([20, 20], pa.int32()),
        "boxes": pa.array(boxes, pa.list_(pa.list_(pa.float32(), 4))),
        "features": pa.array([[[0.5] * WIDTH] * len(b) for b in boxes], pa.list_(pa.list_(pa.float16(), WIDTH))),
    }
    return RegionDataset(datasets.Dataset(pa.table(columns | ({} if questions is None else {"questions": questions}))))


def test_batches_fit_the_model(processor):
    examples = [
        VQAExample(1, "1", "what is it?", ["cat"] * 3 + ["dog"] * 2 + ["T-shirt"] + ["zebra"] * 4),
        VQAExample(2, "42", "how many", ["two"] * 10),
    ]
    label2id = {"2": 0, "dog": 1, "t shirt": 2, "cat": 3}
    samples = list(ExamplesWithRegions(examples, make_regions()))
    batch = VQACollator(processor, label2id, max_regions=2)(samples)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 8, 3], [2, 9, 10, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch["region_attention_mask"].tolist() == [[1, 0], [1, 1]]
    torch.testing.assert_close(batch["region_boxes"][0, 0], torch.tensor([0, 0, 0.5, 0.5]))
    torch.testing.assert_close(batch["labels"], torch.tensor([[0, 0.6, 0.3, 0.9], [1, 0, 0, 0]]))
    outputs = tiny_model(InterBERTForVQA, num_labels=4)(**batch)
    assert outputs.logits.shape == (2, 4) and outputs.loss > 0

    by_count = VQACollator(processor, label2id, scoring="count", max_length=4)(samples)
    torch.testing.assert_close(by_count["labels"][0], torch.tensor([0, 2 / 3, 1 / 3, 1]))
    assert by_count["input_ids"].tolist() == [[2, 5, 6, 3], [2, 9, 10, 3]]
    assert by_count["region_attention_mask"].shape == (2, 3)


def test_a_test_split_has_no_labels(processor):
    examples = [VQAExample(1, "1", "what is it?"), VQAExample(2, "42", "how many")]
    batch = VQACollator(processor, {"2": 0, "dog": 1})(list(ExamplesWithRegions(examples, make_regions())))
    assert "labels" not in batch
    assert set(batch) == set(processor.model_input_names)


def test_listed_answers_are_compared_in_normalized_form(processor):
    examples = [VQAExample(1, "1", "what is it?", ["yoga_mat", "book"])]
    samples = list(ExamplesWithRegions(examples, make_regions()))
    batch = VQACollator(processor, {"book": 0, "desk": 1, "yoga_mat": 2}, scoring="listed")(samples)
    assert batch["labels"].tolist() == [[1, 0, 1]]
    with pytest.raises(ValueError, match="answers that differ when normalized, got 'Book' and another like it"):
        VQACollator(processor, {"book": 0, "Book": 1})
    with pytest.raises(ValueError, match=r"Expected the labels 0 to 1, each once, got others at \[0, 2\]"):
        VQACollator(processor, {"book": 1, "desk": 2})


def test_questions_of_a_dataset():
    questions = [
        [{"question": "what is it?", "answer": "cat", "type": "what"}, {"question": "how many", "answer": None}],
        None,
    ]
    dataset = make_regions(questions)
    assert questions_of_dataset(dataset) == [
        VQAExample("1-0", "1", "what is it?", ["cat"], question_type="what"),
        VQAExample("1-1", "1", "how many"),
    ]
    question = {"question_id": 420, "question": "why", "answers": ["a", "b"], "multiple_choice_answer": "b"}
    dataset = make_regions([[], [question]])
    assert questions_of_dataset(dataset) == [VQAExample(420, "42", "why", ["a", "b"], multiple_choice_answer="b")]
    with pytest.raises(ValueError, match=r"row 1, questions\[0\]: expected the field 'question', got \['answer'\]"):
        questions_of_dataset(make_regions([[], [{"answer": "a"}]]))
    with pytest.raises(ValueError, match="no column 'questions', got"):
        questions_of_dataset(make_regions())


# Samples of the real files


@needs_data
def test_the_3129_answers_are_normalized_already():
    label2id = read_answer_vocabulary(DATA / "vqa" / "trainval_ans2label.json")
    assert len(label2id) == 3129
    assert [answer for answer in label2id if normalize_answer(answer) != answer] == []


@needs_data
def test_daquar(processor):
    examples = read_questions(DATA / "daquar" / "train_questions.jsonl")
    assert len(examples) == 6795
    assert examples[2] == VQAExample(
        12, "image3", "what is on the desk", ["book", "scissor", "papers", "tape_dispenser"]
    )
    label2id = read_answer_vocabulary(DATA / "daquar" / "answer_space.txt")
    assert len(label2id) == 582
    # All listed answers are in the answer space, so that every one of them has its label.
    joined = ExamplesWithRegions(examples, load_region_dataset(DATA / "daquar", "train"))
    collator = VQACollator(processor, label2id, scoring="listed")
    labels = collator.soft_labels(joined.examples)
    assert labels.sum().item() == sum(len(set(example.answers)) for example in examples)
    built = build_answer_vocabulary(examples, min_occurrences=1)
    # The answer space holds those of the test questions, too.
    assert {normalize_answer(answer) for answer in label2id} > set(built)
    counts = Counter(answer for example in examples for answer in set(example.answers))
    assert next(iter(built)) == normalize_answer(counts.most_common(1)[0][0])
    assert joined[0]["record"]["image_id"] == "image3"
    assert 10 <= joined.lengths().min() and joined.lengths().max() <= 28
