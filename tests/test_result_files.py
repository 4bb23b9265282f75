"""What the result files hold, and that they are complete or absent."""

import csv
import json

import numpy as np
import pytest

from files import write_json
from result_files import write_retrieval_scores, write_vcr_probabilities, write_vqa_answers


def test_answers_as_the_vqa_server_takes_them(tmp_path):
    path = tmp_path / "new" / "answers.json"
    write_vqa_answers(path, np.array([262148000, 5]), ["down", "2"])
    assert json.loads(path.read_text("utf-8")) == [
        {"question_id": 262148000, "answer": "down"},
        {"question_id": 5, "answer": "2"},
    ]
    write_vqa_answers(path, [], [])
    assert json.loads(path.read_text("utf-8")) == []
    assert [file.name for file in path.parent.iterdir()] == ["answers.json"]


@pytest.mark.parametrize(
    ("question_ids", "answers", "message"),
    [
        ([1, 2], ["yes"], "an answer to each of 2 questions, got 1"),
        ([1, 1], ["yes", "no"], r"`question_ids` must hold every id once, got these more often: \[1\]"),
        (["1"], ["yes"], "question ids that are integers, as in VQA 2.0, got '1'"),
        ([1.0], ["yes"], "question ids that are integers, as in VQA 2.0, got 1.0"),
        ([True], ["yes"], "question ids that are integers, as in VQA 2.0, got True"),
        ([1], [3], "answers that are texts, got 3 to question 1"),
    ],
)
def test_faulty_answers(tmp_path, question_ids, answers, message):
    with pytest.raises(ValueError, match=message):
        write_vqa_answers(tmp_path / "answers.json", question_ids, answers)
    assert list(tmp_path.iterdir()) == []


def test_probabilities_as_the_vcr_leaderboard_takes_them(tmp_path):
    rng = np.random.default_rng(0)
    answers = rng.dirichlet(np.ones(4), size=2).astype(np.float32)
    rationales = rng.dirichlet(np.ones(4), size=(2, 4)).astype(np.float32)
    path = tmp_path / "vcr.csv"
    write_vcr_probabilities(path, ["test-0", "test-7"], answers, rationales)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == (
        "annot_id,answer_0,answer_1,answer_2,answer_3,"
        "rationale_conditioned_on_a0_0,rationale_conditioned_on_a0_1,rationale_conditioned_on_a0_2,"
        "rationale_conditioned_on_a0_3,rationale_conditioned_on_a1_0,rationale_conditioned_on_a1_1,"
        "rationale_conditioned_on_a1_2,rationale_conditioned_on_a1_3,rationale_conditioned_on_a2_0,"
        "rationale_conditioned_on_a2_1,rationale_conditioned_on_a2_2,rationale_conditioned_on_a2_3,"
        "rationale_conditioned_on_a3_0,rationale_conditioned_on_a3_1,rationale_conditioned_on_a3_2,"
        "rationale_conditioned_on_a3_3"
    ).split(",")
    assert [row["annot_id"] for row in rows] == ["test-0", "test-7"]
    for number, row in enumerate(rows):
        for choice in range(4):
            assert np.float32(row[f"answer_{choice}"]) == answers[number, choice]
            for answer in range(4):
                column = f"rationale_conditioned_on_a{answer}_{choice}"
                assert np.float32(row[column]) == rationales[number, answer, choice]
    assert [file.name for file in tmp_path.iterdir()] == ["vcr.csv"]


@pytest.mark.parametrize(
    ("annot_ids", "answers", "rationales", "message"),
    [
        (["a"], np.ones((1, 3)), np.ones((1, 4, 4)), r"`answer_.*` must have the shape \(1, 4\), got \(1, 3\)"),
        (["a"], np.ones((2, 4)), np.ones((1, 4, 4)), r"`answer_.*` must have the shape \(1, 4\), got \(2, 4\)"),
        (["a"], np.ones((1, 4)), np.ones((1, 4)), r"`rationale_.*` must have the shape \(1, 4, 4\), got \(1, 4\)"),
        (["a"], np.full((1, 4), 1.5), np.ones((1, 4, 4)), r"within \[0, 1\], got values from 1.5 to 1.5"),
        (["a"], np.ones((1, 4)), np.full((1, 4, 4), np.nan), r"within \[0, 1\], got values from nan to nan"),
        (["a"] * 2, np.ones((2, 4)), np.ones((2, 4, 4)), r"`annot_ids` must hold every id once, .* \['a'\]"),
    ],
)
def test_faulty_probabilities(tmp_path, annot_ids, answers, rationales, message):
    with pytest.raises(ValueError, match=message):
        write_vcr_probabilities(tmp_path / "vcr.csv", annot_ids, answers, rationales)
    assert list(tmp_path.iterdir()) == []


def test_scores_with_the_ids_of_rows_and_columns(tmp_path):
    folder = tmp_path / "new"
    scores = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_retrieval_scores(folder, scores, ["a dog", "a cat", "zwei Füße"], np.array([1, 0, 1]), ["7", "12"])
    saved = np.load(folder / "retrieval_scores.npy")
    assert saved.dtype == np.float32
    np.testing.assert_array_equal(saved, scores)
    assert json.loads((folder / "retrieval_ids.json").read_text("utf-8")) == {
        "scores": "log-odds",
        "captions": [
            {"caption_id": "12#0", "image_id": "12", "caption": "a dog"},
            {"caption_id": "7#0", "image_id": "7", "caption": "a cat"},
            {"caption_id": "12#1", "image_id": "12", "caption": "zwei Füße"},
        ],
        "image_ids": ["7", "12"],
    }
    assert {file.name for file in folder.iterdir()} == {"retrieval_scores.npy", "retrieval_ids.json"}


def test_numbers_that_json_does_not_know(tmp_path):
    write_json(tmp_path / "results.json", [{"eval_pearson": float("nan"), "eval_loss": 0.5, "of_seeds": (np.inf, 1)}])
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == [
        {"eval_pearson": None, "eval_loss": 0.5, "of_seeds": [None, 1]}
    ]


def test_ids_never_stand_beside_other_scores(tmp_path, monkeypatch):
    write_retrieval_scores(tmp_path, np.zeros((1, 1)), ["a dog"], [0], ["7"])

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            write_retrieval_scores(tmp_path, np.ones((1, 1)), ["a cat"], [0], ["8"])
    assert not (tmp_path / "retrieval_ids.json").exists()
    assert np.load(tmp_path / "retrieval_scores.npy") == 0


@pytest.mark.parametrize(
    ("shape", "image_of_caption", "image_ids", "message"),
    [
        ((3, 2), [0, 1], ["7", "8"], r"shape \(captions, images\), \(2, 2\), got \(3, 2\)"),
        ((2, 2), [0, 1, 1], ["7", "8"], "must be 2 integers from 0 to 1, got"),
        ((2, 2), [0, 2], ["7", "8"], "must be 2 integers from 0 to 1, got"),
        ((2, 2), [0, -1], ["7", "8"], "must be 2 integers from 0 to 1, got"),
        ((2, 2), [0.0, 1.0], ["7", "8"], "must be 2 integers from 0 to 1, got"),
        ((2, 2), [0, 1], ["7", "7"], r"`image_ids` must hold every id once, got these more often: \['7'\]"),
    ],
)
def test_faulty_scores(tmp_path, shape, image_of_caption, image_ids, message):
    with pytest.raises(ValueError, match=message):
        write_retrieval_scores(tmp_path, np.zeros(shape), ["a dog", "a cat"], image_of_caption, image_ids)
    assert list(tmp_path.iterdir()) == []
