"""The modules of examples/metrics, loaded by path, against numbers worked out by hand and other implementations."""

import doctest
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

ROOT = Path(__file__).resolve().parent.parent
METRICS = ROOT / "examples" / "metrics"
NAMES = ["glue_metrics", "precision_at_k", "retrieval_recall", "vcr_accuracy", "vqa_score"]
NAN = float("nan")


def load(name: str, config_name: str | None = None) -> evaluate.Metric:
    # On disk, a failed computation leaves a lock, which the next one waits for.
    return evaluate.load(str(METRICS / name), config_name, keep_in_memory=True)


# All of them


def test_every_folder_is_a_module_with_a_card():
    folders = [path.name for path in METRICS.iterdir() if path.name != "__pycache__"]
    assert sorted(folders) == NAMES
    for name in NAMES:
        assert {path.name for path in (METRICS / name).glob("*.*")} == {f"{name}.py", "README.md"}
        metric = load(name, "cola" if name == "glue_metrics" else None)
        assert metric.name == name and metric.description.strip() and metric.inputs_description.strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_example_on_the_card(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", (METRICS / name / "README.md").read_text("utf-8"), re.DOTALL)
    test = doctest.DocTestParser().get_doctest(example, {}, name, None, None)
    assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) > 2


LOAD_ALL_OFFLINE = """
import json, socket, sys

def refuse(*arguments):
    raise AssertionError(f"the network was asked for {arguments}")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate

folder = sys.argv[1]
results = {}
for name, config_name, arguments in json.loads(sys.argv[2]):
    results |= evaluate.load(f"{folder}/{name}", config_name).compute(**arguments)
sys.modules["processing"] = None
try:
    evaluate.load(f"{folder}/vqa_score")
except ImportError as error:
    results["error"] = str(error)
print(json.dumps(results))
"""


def test_all_load_offline_by_path_from_elsewhere(tmp_path):
    choices = [{"answer": 0, "rationale": 0}]
    calls = [
        ("retrieval_recall", None, {"scores": [[2, 1], [1, 2]], "references": [[0], [1]], "ks": [1]}),
        ("precision_at_k", None, {"scores": [[2, 1]], "references": [[0]], "ks": [2]}),
        ("vqa_score", None, {"predictions": ["yes"], "references": [["yes"] * 10]}),
        ("vcr_accuracy", None, {"predictions": choices, "references": choices}),
        ("glue_metrics", "rte", {"predictions": [0, 1], "references": [1, 1]}),
    ]
    environment = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    process = subprocess.run(
        [sys.executable, "-c", LOAD_ALL_OFFLINE, str(METRICS), json.dumps(calls)],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert "install the InterBERT repository" in results.pop("error")
    assert results == {
        "image_recall_at_1": 1.0,
        "image_median_rank": 1.0,
        "text_recall_at_1": 1.0,
        "text_median_rank": 1.0,
        "precision_at_2": 0.5,
        "vqa_score": 1.0,
        "answer_accuracy": 1.0,
        "rationale_accuracy": 1.0,
        "answer_and_rationale_accuracy": 1.0,
        "accuracy": 0.5,
    }


# Retrieval. What the numbers are is tested with processing.ranking, in test_ranking.py.


def test_recall_of_flickr30k_size_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    image_of_caption = np.arange(5000) // 5
    scores = rng.random((5000, 1000))
    scores[np.arange(5000), image_of_caption] += 0.5
    results = load("retrieval_recall").compute(scores=scores, references=image_of_caption[:, None])
    for k in (1, 5, 10):
        expected = sklearn.metrics.top_k_accuracy_score(image_of_caption, scores, k=k)
        assert 0.4 < expected < 1 and results[f"image_recall_at_{k}"] == pytest.approx(expected)
    best_of_image = scores[np.arange(5000), image_of_caption].reshape(1000, 5).max(axis=1)
    is_other = image_of_caption[:, None] != np.arange(1000)
    ranks = 1 + ((scores > best_of_image) & is_other).sum(axis=0)
    assert results["text_recall_at_1"] == pytest.approx((ranks == 1).mean())
    assert results["text_median_rank"] == np.median(ranks)


def test_recall_gets_the_scores_as_they_are():
    # 1 and 1 + 1e-12 are one number in float32.
    arguments = {"references": [[1]], "ks": [1]}
    recall = load("retrieval_recall")
    assert recall.compute(scores=np.array([[1.0, 1.0 + 1e-12]]), **arguments)["image_recall_at_1"] == 1
    assert recall.compute(scores=np.ones((1, 2)), **arguments)["image_recall_at_1"] == 0
    assert recall.compute(scores=np.full((1, 2), NAN), **arguments)["image_recall_at_1"] == 0


def test_precision():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    assert load("precision_at_k").compute(scores=scores, references=[[0, 2, 5]]) == {"precision_at_5": 0.4}


@pytest.mark.parametrize("name", ["retrieval_recall", "precision_at_k"])
@pytest.mark.parametrize(
    ("scores", "references", "message"),
    [
        (np.zeros((2, 3)), [[0]], "right candidates of 2 queries"),
        (np.zeros((2, 3)), [[0], [3]], "from 0 to 2"),
        (np.zeros(3), [[0]], r"shape \(queries, candidates\)"),
        (np.zeros((0, 3)), [], "at least one of each"),
        (np.zeros((1, 3)), [0], "don't match the expected format"),
    ],
)
def test_faulty_retrieval(name, scores, references, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(scores=scores, references=references)


# VQA


def test_vqa_score_by_hand():
    # Three of ten said "2": three of the sets of nine lack one of them, 2 / 3, seven do not, 1: (3 · 2/3 + 7) / 10.
    numbers = ["2", "two", "2."] + ["3"] * 7
    # One said "dog", two "cat", the rest something else each.
    animals = ["a dog", "cat", "Cat"] + [f"animal {number}" for number in range(7)]
    predictions = ["two", "3", "five", "The dog!", "cat", "yes"]
    references = [numbers, numbers, numbers, animals, animals, ["yes"] * 10]
    results = load("vqa_score").compute(
        predictions=predictions,
        references=references,
        answer_types=["number", "number", "number", "other", "other", "yes/no"],
        question_types=["how many", "how many", "what", "what", "what", None],
    )
    scores = [0.9, 1.0, 0.0, 0.3, 0.6, 1.0]
    assert results["vqa_score"] == pytest.approx(sum(scores) / 6)
    assert results["by_answer_type"] == pytest.approx({"number": 1.9 / 3, "other": 0.45, "yes/no": 1.0})
    assert results["by_question_type"] == pytest.approx({"how many": 0.95, "what": 0.3})


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # What all ten wrote alike is compared as written, white space at its ends apart.
        ("t-shirt", ["t-shirt"] * 10, 1),
        (" t-shirt\n", ["t-shirt "] * 10, 1),
        ("t shirt", ["t-shirt"] * 10, 0),
        ("Yes.", ["yes"] * 10, 0),
        # Otherwise both sides are normalized.
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1),
        ("Yes.", ["yes"] * 9 + ["no"], 1),
        ("2 dogs", ["two dogs"] * 3 + ["the dogs"] * 7, 0.9),
    ],
)
def test_what_the_official_evaluation_compares(prediction, answers, score):
    measured = load("vqa_score").compute(predictions=[prediction], references=[answers])
    assert measured == {"vqa_score": pytest.approx(score)}


def test_vqa_score_is_the_mean_over_the_sets_of_nine():
    rng = np.random.default_rng(0)
    references = [rng.choice(["red", "blue", "green"], size=10, p=[0.2, 0.3, 0.5]).tolist() for _ in range(50)]
    expected = []
    for answers in references:
        sets = itertools.combinations(answers, 9)
        expected.append(np.mean([min(1, nine.count("blue") / 3) for nine in sets]))
    vqa_score = load("vqa_score")
    assert 0 < np.mean(expected) < 1
    results = vqa_score.compute(predictions=["Blue"] * 50, references=references)
    assert results == {"vqa_score": pytest.approx(np.mean(expected))}
    # In portions, as a loop over batches would.
    for prediction, answers in zip(["blue"] * 50, references, strict=True):
        vqa_score.add(prediction=prediction, reference=answers)
    assert vqa_score.compute() == results


@pytest.mark.parametrize(
    ("predictions", "references", "types", "message"),
    [
        ([], [], {}, "at least one question, got none"),
        (["yes"], [["yes"] * 3], {}, "answers of 10 annotators to every question, got 3"),
        (["yes"], ["yes please"], {}, "Got a string but expected a list"),
        (["yes"], [["yes"] * 9 + [None]], {}, "answers that are texts, got 'yes' for"),
        (["yes", "no"], [["yes"] * 10], {}, "Mismatch in the number"),
        (["yes"], [["yes"] * 10], {"answer_types": []}, "`answer_types` must have one item for each of 1 .* got 0"),
        (["yes"], [["yes"] * 10], {"question_types": ["a", "b"]}, "`question_types` must have one item .* got 2"),
    ],
)
def test_faulty_answers(predictions, references, types, message):
    with pytest.raises(ValueError, match=message):
        load("vqa_score").compute(predictions=predictions, references=references, **types)


# VCR


def choices(answers, rationales) -> list[dict[str, int]]:
    return [{"answer": a, "rationale": r} for a, r in zip(answers, rationales, strict=True)]


def test_vcr_accuracy_by_hand():
    # Right are answers 1, 2 and 3, and rationales 3, 4 and 5.
    predictions = choices([0, 1, 2, 3, 0], [0, 1, 2, 3, 3])
    references = choices([0, 1, 2, 0, 1], [3, 2, 2, 3, 3])
    results = load("vcr_accuracy").compute(predictions=predictions, references=references)
    assert results == pytest.approx(
        {"answer_accuracy": 0.6, "rationale_accuracy": 0.6, "answer_and_rationale_accuracy": 0.2}
    )


def test_vcr_accuracy_agrees_with_scikit_learn():
    drawn = np.random.default_rng(0).integers(4, size=(4, 200))
    results = load("vcr_accuracy").compute(predictions=choices(*drawn[:2]), references=choices(*drawn[2:]))
    assert results["answer_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(drawn[2], drawn[0]))
    assert results["rationale_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(drawn[3], drawn[1]))
    # A pair of choices is one label for each annotation.
    both = sklearn.metrics.accuracy_score(4 * drawn[2] + drawn[3], 4 * drawn[0] + drawn[1])
    assert results["answer_and_rationale_accuracy"] == pytest.approx(both)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "`predictions` of at least one annotation, got none"),
        (choices([0], [4]), choices([0], [1]), "Class label 4"),
        (choices([0], [0.5]), choices([0], [1]), "don't match the expected format"),
        (choices([0], [-1]), choices([0], [1]), "`predictions` from 0 to 3, got {'answer': 0, 'rationale': -1}"),
        (choices([0], [0]), choices([0], [None]), "`references` from 0 to 3, got {'answer': 0, 'rationale': None}"),
        (choices([0, 1], [0, 1]), choices([0], [0]), "Mismatch in the number"),
        ([[0, 1]], [[0, 1]], "don't match the expected format"),
    ],
)
def test_faulty_choices(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load("vcr_accuracy").compute(predictions=predictions, references=references)


# GLUE


def test_matthews_correlation_of_cola():
    predictions, references = [1, 1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0, 1]
    # 4 true positives, 2 true negatives, 1 false positive, 1 false negative.
    expected = (4 * 2 - 1 * 1) / np.sqrt((4 + 1) * (4 + 1) * (2 + 1) * (2 + 1))
    cola = load("glue_metrics", "cola")
    assert cola.compute(predictions=predictions, references=references) == {
        "matthews_correlation": pytest.approx(expected)
    }
    # Of classes it is Pearson's correlation.
    assert expected == pytest.approx(np.corrcoef(predictions, references)[0, 1])
    assert cola.compute(predictions=[1] * 8, references=references) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_accuracy_of_sst2_and_rte(task):
    results = load("glue_metrics", task).compute(predictions=np.array([1, 0, 1, 1]), references=[1, 1, 1, 0])
    assert results == {"accuracy": 0.5}


def test_correlations_of_stsb():
    predictions, references = [0.0, 1.0, 5.0, 3.0], [0.0, 2.0, 4.0, 4.0]
    stsb = load("glue_metrics", "stsb")
    results = stsb.compute(predictions=predictions, references=references)
    # Deviations from the means 2.25 and 2.5: products sum up to 5.625 + 0.625 + 4.125 + 1.125, squares to 14.75 and 11.
    assert results["pearson"] == pytest.approx(11.5 / np.sqrt(14.75 * 11))
    # Ranks 1, 2, 4, 3 and 1, 2, 3.5, 3.5: deviations' products sum up to 4.5, squares to 5 and 4.5.
    assert results["spearmanr"] == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    predictions, references = np.random.default_rng(0).normal(size=(2, 100)).round(1)
    results = stsb.compute(predictions=predictions, references=references)
    assert results["pearson"] == pytest.approx(np.corrcoef(predictions, references)[0, 1])
    ranks = [scipy.stats.rankdata(scores) for scores in (predictions, references)]
    assert results["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("predictions", [[1.0, 1.0, 1.0], [1.0, NAN, 2.0]])
def test_scores_that_do_not_vary_or_are_no_numbers_have_no_correlation(predictions):
    results = load("glue_metrics", "stsb").compute(predictions=predictions, references=[1.0, 2.0, 3.0])
    assert results == {"pearson": pytest.approx(NAN, nan_ok=True), "spearmanr": pytest.approx(NAN, nan_ok=True)}


@pytest.mark.parametrize(
    ("task", "predictions", "references", "message"),
    [
        ("cola", [], [], r"`predictions` of 0 and 1, got \[\]"),
        ("rte", [2], [1], "Class label 2"),
        ("rte", [0.7], [1], "don't match the expected format"),
        ("rte", [[0.1, 0.9]], [1], "don't match the expected format|not supported"),
        ("sst2", [1, 0], [1, -1], r"`references` of 0 and 1, got \[-1, 1\]"),
        ("sst2", [1], [None], r"`references` of 0 and 1, got \[None\]"),
        ("stsb", [1.0], [1.0], "at least 2 pairs of scores, got 1"),
        ("stsb", [1.0, 2.0], [1.0, None], "a score for every example, got None"),
        ("stsb", [1.0, 2.0], [1.0], "Mismatch in the number"),
    ],
)
def test_faulty_classes_and_scores(task, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load("glue_metrics", task).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("config_name", [None, "mnli"])
def test_other_tasks_of_glue(config_name):
    with pytest.raises(ValueError, match=r"must be one of \['cola', 'sst2', 'stsb', 'rte'\], got"):
        load("glue_metrics", config_name)
