"""Visual commonsense reasoning as a user runs it, on generated scenes in VCR's file format; the script's main function
in this process."""

import csv
import json
import shutil
import sys
from pathlib import Path
from statistics import fmean

import datasets
import pytest
import torch
from killing import assert_same_weights, killed_at

import run_vcr
from arguments import parse_arguments
from finetuning import TaskArguments
from generate_scenes import write_scenes
from generate_vcr import write_vcr
from model_loading import ModelArguments
from modeling_interbert import InterBERTForMultipleChoice
from processing import InterBERTProcessor, load_region_dataset
from processing.tasks import VCRCollator, VCRDataset, VCRExample, read_vcr
from run_vcr import VCRArguments, check_labels, measure_choices, read_answer_predictions
from training import OutputArguments, TrainingArguments

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_RECORD = REPOSITORY.parent / "shared" / "data" / "vcr" / "vcr_val0_record.json"
TINY = (
    "hidden_size=32,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=64,vision_intermediate_size=64,"
    "num_hidden_layers=1,num_text_layers=1,num_vision_layers=1,pooler_size=16"
)
# Learns in seconds: weights that are not almost equal at first, and no dropout.
SMALL = (
    "hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,"
    "vision_intermediate_size=128,num_hidden_layers=1,num_text_layers=1,num_vision_layers=1,pooler_size=64,"
    "initializer_range=0.1,hidden_dropout_prob=0,vision_hidden_dropout_prob=0,attention_probs_dropout_prob=0,"
    "vision_attention_probs_dropout_prob=0"
)
TASKS = ("answer", "rationale")
CHANCE = 1 / 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "scenes", num_train=1200, num_validation=200, num_test=6)
    write_vcr(folder / "scenes", folder / "vcr")
    lines = (folder / "vcr" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "vcr" / "few.jsonl").write_text("".join(lines[:40]))
    return folder


def run(data: Path, output_dir: Path, *arguments: str) -> dict[str, float]:
    """Runs the script in this process, and returns what it measured last, if anything."""
    command = ["run_vcr.py", "--output_dir", str(output_dir), *arguments]
    if "--dataset_name" not in arguments:
        command += ["--dataset_name", str(data / "scenes")]
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", command)
        run_vcr.main()
    path = output_dir / "eval_results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def annotations(data: Path, **names: str) -> list[str]:
    """Arguments for annotations of splits, by split the name of its file."""
    words = [(f"--{split}_annotations", str(data / "vcr" / f"{name}.jsonl")) for split, name in names.items()]
    return [word for pair in words for word in pair]


def metadata(data: Path) -> list[str]:
    return ["--metadata_folder", str(data / "vcr" / "vcr1images")]


def from_scratch(data: Path, overrides: str = TINY) -> list[str]:
    return ["--tokenizer_name", str(data / "scenes" / "tokenizer"), "--config_overrides", overrides]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict[str, tuple[Path, dict[str, float]]]:
    """By task the folder of its model, and what was measured of it."""
    options = "--do_train --do_eval --num_train_epochs 6 --per_device_train_batch_size 32 --group_by_length"
    options += " --learning_rate 3e-3 --num_warmup_steps 30 --ema_decay 0.9 --no_eval_every_epoch"
    folder = tmp_path_factory.mktemp("vcr")
    return {
        task: (
            folder / task,
            run(
                data,
                folder / task,
                *(*options.split(), "--task", task, *from_scratch(data, SMALL), *metadata(data)),
                *annotations(data, train="train", validation="val"),
            ),
        )
        for task in TASKS
    }


def two_models(trained) -> list[str]:
    folders = [str(trained[task][0]) for task in TASKS]
    return ["--task", "both", "--model_name_or_path", folders[0], "--rationale_model_name_or_path", folders[1]]


@pytest.mark.parametrize("task", TASKS)
def test_training_gets_well_above_chance(trained, task):
    folder, results = trained[task]
    raw, averaged = results[f"eval_raw_{task}_accuracy"], results[f"eval_{task}_accuracy"]
    print(f"{task}: accuracy {raw:.3f}, averaged {averaged:.3f}; chance {CHANCE}")
    assert raw > CHANCE + 0.2 and averaged > CHANCE + 0.2
    assert "AutoModelForMultipleChoice" in (folder / "README.md").read_text()
    assert f"task: {task}\n" in (folder / "recipe.yaml").read_text()
    # Whoever uses the processor gets texts as long as in training, however short those of pretraining were.
    assert (
        InterBERTProcessor.from_pretrained(folder).tokenizer.model_max_length == {"answer": 60, "rationale": 80}[task]
    )


@pytest.fixture(scope="module")
def together(data, trained, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("vcr") / "both"
    splits = annotations(data, validation="val", test="test")
    results = run(data, folder, "--do_eval", "--do_predict", *two_models(trained), *metadata(data), *splits)
    return folder, results


def test_both_models_are_evaluated_together(data, trained, together):
    folder, results = together
    for task in TASKS:
        # The averaged weights are the ones that were saved.
        for name in (f"{task}_accuracy", f"{task}_loss"):
            assert results[f"eval_{name}"] == pytest.approx(trained[task][1][f"eval_{name}"], rel=1e-4), name
    rows = read_lines(folder / "eval_predictions.jsonl")
    examples = read_vcr(data / "vcr" / "val.jsonl")
    scores = {}
    for task, of_task in zip(TASKS, (rows[: len(examples)], rows[len(examples) :]), strict=True):
        assert [(row["annot_id"], row["task"]) for row in of_task] == [(example.annot_id, task) for example in examples]
        assert [row["label"] for row in of_task] == [getattr(example, f"{task}_label") for example in examples]
        for row in of_task:
            choice = max(range(4), key=row["probabilities"].__getitem__)
            assert row["score"] == (choice == row["label"])
            assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        scores[task] = [row["score"] for row in of_task]
        assert fmean(scores[task]) == pytest.approx(results[f"eval_{task}_accuracy"])
        # The file that training left is of the same weights.
        for row, before in zip(of_task, read_lines(trained[task][0] / "eval_predictions.jsonl"), strict=True):
            assert row | {"probabilities": None} == before | {"probabilities": None}
            assert row["probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)
    both = [answer * rationale for answer, rationale in zip(*scores.values(), strict=True)]
    print(f"Q→AR {fmean(both):.3f}; chance {CHANCE**2}")
    assert results["eval_answer_and_rationale_accuracy"] == pytest.approx(fmean(both))
    assert fmean(both) > CHANCE


def test_one_model_beside_the_predictions_of_the_other(data, trained, together, tmp_path):
    predictions = trained["answer"][0] / "eval_predictions.jsonl"
    results = run(
        data,
        tmp_path,
        *("--do_eval", "--task", "rationale", "--model_name_or_path", str(trained["rationale"][0])),
        *("--answer_predictions", str(predictions), *metadata(data), *annotations(data, validation="val")),
    )
    (tmp_path / "of_vqa.jsonl").write_text('{"question_id": 1, "answer": "red"}\n')
    with pytest.raises(ValueError, match="of_vqa.jsonl, line 1: expected the field 'task', got"):
        read_answer_predictions(str(tmp_path / "of_vqa.jsonl"), [])
    expected = {name: value for name, value in together[1].items() if name != "eval_answer_loss"}
    assert results == pytest.approx(expected, rel=1e-4)


def test_the_file_for_the_leaderboard(data, trained, together):
    folder, _ = together
    with open(folder / "test_predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    examples = read_vcr(data / "vcr" / "test.jsonl")
    assert [row["annot_id"] for row in rows] == [example.annot_id for example in examples]
    assert len(rows[0]) == 1 + 4 + 16
    lines = read_lines(folder / "test_predictions.jsonl")

    # One of them by hand: its rationales if answer 2 were the right one.
    regions = load_region_dataset(data / "scenes", "test")
    (sample,) = VCRDataset(examples[3:4], regions, data / "vcr" / "vcr1images")
    for task, name, given_answer in (("answer", "answer_{}", None), ("rationale", "rationale_conditioned_on_a2_{}", 2)):
        model = InterBERTForMultipleChoice.from_pretrained(trained[task][0]).eval()
        processor = InterBERTProcessor.from_pretrained(trained[task][0])
        with torch.no_grad():
            logits = model(**VCRCollator(processor, task, given_answer=given_answer)([sample])).logits[0]
        expected = pytest.approx(logits.softmax(dim=0).tolist(), abs=1e-5)
        assert [float(rows[3][name.format(choice)]) for choice in range(4)] == expected
        predicted = lines[3][f"{task}_probabilities"]
        assert (predicted if task == "answer" else predicted[2]) == expected


def test_predictions_of_one_model(data, trained, tmp_path):
    command = ["--do_predict", "--task", "rationale", "--model_name_or_path", str(trained["rationale"][0])]
    run(data, tmp_path, *command, *metadata(data), *annotations(data, test="test"))
    rows = read_lines(tmp_path / "test_predictions.jsonl")
    assert [row.keys() for row in rows] == [{"annot_id", "rationale_probabilities"}] * 6
    assert torch.tensor([row["rationale_probabilities"] for row in rows]).shape == (6, 4, 4)
    assert not (tmp_path / "test_predictions.csv").exists()


def test_annotated_boxes_may_be_a_region_dataset(data, tmp_path):
    """The boxes of the scenes themselves stand for those of annotators: as many regions again."""
    options = "--do_train --do_eval --max_train_steps 1 --max_regions 20 --per_device_train_batch_size 8"
    results = run(
        data,
        tmp_path,
        *(*options.split(), *from_scratch(data), "--annotated_dataset_name", str(data / "scenes")),
        *annotations(data, train="few", validation="val"),
    )
    assert 0 < results["eval_answer_accuracy"] < 1


def test_a_killed_training_ends_with_the_same_weights(data, tmp_path):
    options = "--do_train --do_eval --task rationale --num_train_epochs 2 --per_device_train_batch_size 8"
    command = [*options.split(), "--learning_rate", "1e-3", "--ema_decay", "0.9", *from_scratch(data), *metadata(data)]
    command += [*annotations(data, train="few", validation="val"), "--max_eval_samples", "20"]
    command += ["--resume_from_checkpoint", "latest"]
    expected = run(data, tmp_path / "undisturbed", *command)

    command += ["--checkpointing_steps", "2", "--save_total_limit", "1"]
    for step in (3, 7):
        with killed_at(step):
            run(data, tmp_path / "killed", *command)
    assert run(data, tmp_path / "killed", *command) == pytest.approx(expected, rel=1e-5)
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")

    # A run for the other task does not go on from there.
    command[command.index("rationale")] = "answer"
    with pytest.raises(ValueError, match="is of another run: task was rationale, is answer"):
        run(data, tmp_path / "killed", *command)


def test_nothing_is_evaluated_on_images_that_are_trained_on(data, tmp_path):
    rows = [json.loads(line) for line in (data / "vcr" / "few.jsonl").read_text().splitlines()]
    others = [row | {"annot_id": f"val-{number}"} for number, row in enumerate(rows)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    splits = annotations(data, train="few") + ["--validation_annotations", str(tmp_path / "val.jsonl")]
    with pytest.raises(ValueError, match="Evaluation needs images that are not trained on, got"):
        run(
            data,
            tmp_path / "out",
            "--do_train",
            "--do_eval",
            "--validation_split",
            "train",
            *splits,
            *from_scratch(data),
        )


@pytest.mark.skipif(not REAL_RECORD.exists(), reason="needs the VCR sample")
def test_the_real_record(data, trained, tmp_path):
    """Its image is another one: what is tried is the way of a real annotation through the script."""
    (scene,) = load_region_dataset(data / "scenes", "test").dataset.select([0])
    scene |= {"image_id": "val-0"}
    scene.pop("image")
    (tmp_path / "regions" / "data").mkdir(parents=True)
    for split in ("validation", "test"):
        features = load_region_dataset(data / "scenes", "test").dataset.remove_columns("image").features
        dataset = datasets.Dataset.from_list([scene], features=features)
        dataset.to_parquet(tmp_path / "regions" / "data" / f"{split}-00000-of-00001.parquet")
    (example,) = read_vcr(REAL_RECORD)
    path = tmp_path / "images" / example.metadata_path
    path.parent.mkdir(parents=True)
    shutil.copy(data / "vcr" / "vcr1images" / "scenes" / "test-000000.json", path)
    results = run(
        data,
        tmp_path / "out",
        *("--do_eval", "--do_predict", *two_models(trained), "--dataset_name", str(tmp_path / "regions")),
        *("--metadata_folder", str(tmp_path / "images"), "--validation_annotations", str(REAL_RECORD)),
        *("--test_annotations", str(REAL_RECORD)),
    )
    both = results["eval_answer_accuracy"] * results["eval_rationale_accuracy"]
    assert results["eval_answer_and_rationale_accuracy"] == both
    rows = read_lines(tmp_path / "out" / "eval_predictions.jsonl")
    assert [(row["annot_id"], row["label"]) for row in rows] == [("val-0", 1), ("val-0", 3)]
    assert len((tmp_path / "out" / "test_predictions.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--do_train", "Expected `--train_annotations`, got none"),
        ("--do_train --train_annotations {vcr}/none.jsonl", "none.jsonl"),
        (
            "--do_eval --validation_annotations {vcr}/test.jsonl --validation_split test",
            r"test\.jsonl: training and evaluation need annotations with labels, got 6 of 6 without: \['test-0', 'tes",
        ),
        ("--do_train --train_annotations {vcr}/val.jsonl", "images of all examples in the region dataset, got 19"),
        ("--do_eval --validation_annotations {vcr}/val.jsonl", "Without `--do_train` there must be a trained model"),
        (
            "--do_train --train_annotations {vcr}/few.jsonl --task both --rationale_model_name_or_path x",
            "Each task has a model of its own: `--do_train` takes `--task answer` or rationale",
        ),
        (
            "--do_train --task rationale --answer_predictions answers.jsonl",
            "`--answer_predictions` are evaluated with the rationales, `--do_eval`",
        ),
    ],
)
def test_bad_input(data, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(data, tmp_path / "out", *arguments.format(vcr=data / "vcr").split(), *from_scratch(data))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"metadata_folder": "a", "annotated_dataset_name": "b"}, "not both"),
        ({"task": "both"}, "`--task both` and `--rationale_model_name_or_path` go together, got one of them"),
        ({"rationale_model_name_or_path": "a"}, "go together, got one of them"),
        ({"answer_predictions": "a"}, "goes with `--task rationale`, got `--task answer`"),
        ({"max_regions": 0}, "`--max_regions` must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VCRArguments(dataset_name="data", **arguments)


# ---------------------------------------------------------------- parts, with numbers worked out by hand


def make_examples(*labels: tuple[int | None, int | None]) -> list[VCRExample]:
    return [
        VCRExample(f"val-{number}", "val-0", "q", list("abcd"), list("efgh"), *pair, "x.json")
        for number, pair in enumerate(labels)
    ]


def test_accuracies():
    examples = make_examples((0, 1), (2, 3), (1, 1), (3, 0))
    # Answers: right, right, wrong, right. Rationales: right, wrong, right, right.
    chosen = {"answer": [0, 2, 0, 3], "rationale": [1, 0, 1, 0]}
    assert measure_choices({"answer": chosen["answer"]}, examples) == {"answer_accuracy": 0.75}
    assert measure_choices({"rationale": chosen["rationale"]}, examples) == {"rationale_accuracy": 0.75}
    assert measure_choices(chosen, examples) == {
        "answer_accuracy": 0.75,
        "rationale_accuracy": 0.75,
        "answer_and_rationale_accuracy": 0.5,
    }


def test_rationales_need_the_right_answer_too():
    examples = make_examples((0, None), (None, 1), (2, 2))
    with pytest.raises(ValueError, match=r"val\.jsonl: .* got 1 of 3 without: \['val-1'\]"):
        check_labels(examples, ["answer"], "val.jsonl")
    with pytest.raises(ValueError, match=r"got 2 of 3 without: \['val-0', 'val-1'\]"):
        check_labels(examples, ["rationale"], "val.jsonl")
    with pytest.raises(ValueError, match="got 0 of 0 without"):
        check_labels([], ["answer"], "val.jsonl")


def test_predictions_of_another_model(tmp_path):
    rows = [
        {"annot_id": "val-1", "task": "answer", "probabilities": [0.1, 0.2, 0.3, 0.4]},
        {"annot_id": "val-0", "task": "answer", "probabilities": [0.1, 0.5, 0.2, 0.2]},
        {"annot_id": "val-2", "task": "rationale", "probabilities": [1, 0, 0, 0]},
    ]
    path = tmp_path / "eval_predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_answer_predictions(str(path), make_examples((0, 0), (0, 0))) == [1, 3]
    with pytest.raises(ValueError, match=r"an answer to each of 3 annotations, got none to 1: \['val-2'\]"):
        read_answer_predictions(str(path), make_examples((0, 0), (0, 0), (0, 0)))


@pytest.mark.parametrize("task, length", [("answer", 60), ("rationale", 80)])
def test_the_paper_s_recipes(task, length):
    groups = (TaskArguments, ModelArguments, VCRArguments, TrainingArguments, OutputArguments)
    command = ["--recipe", str(REPOSITORY / "examples" / "recipes" / f"vcr_{task}.yaml"), "--do_train"]
    command += ["--bert_name_or_path", "bert", "--dataset_name", "data", "--output_dir", "out"]
    _, _, args, training, _ = parse_arguments(groups, "VCR.", command)
    assert (training.learning_rate, training.num_train_epochs, training.ema_decay) == (2e-5, 5, 0.9999)
    assert 8 * training.per_device_train_batch_size == 32
    assert (training.num_warmup_steps, training.lr_scheduler_type) == (10000, "linear")
    assert (args.tasks, args.max_seq_length, args.max_regions) == ([task], length, 100)
