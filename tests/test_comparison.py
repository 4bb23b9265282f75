"""What the comparisons make of the runs that they compare."""

import json
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import numpy as np
import pytest

import compare_on_retrieval
import compare_on_vqa
import compare_pretraining
import comparison
import run_title_retrieval
from compare_on_glue import finetune, scores, summarize
from comparison import draw_bars, format_scores, named_arguments, run_once, write_comparison


def finish(folder: Path, **results: float):
    """What a training script leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (folder / "all_results.json").write_text(json.dumps([{"epoch": 1, "eval_accuracy": 0.5}, {"epoch": 2} | results]))


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that are run; a run takes no time, and reaches its number as accuracy."""
    started: list[list[str]] = []

    def run(command: list[str], check: bool):
        assert check
        started.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        reached = len(started) / 10
        recalls = {f"eval_image_recall_at_{k}": reached for k in (1, 5, 10)}
        recalls["eval_precision_at_5"] = reached / 5
        finish(folder, eval_accuracy=reached, majority_accuracy=0.4, **recalls)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(comparison.subprocess, "run", run)
    return started


def test_a_finished_run_is_not_repeated(tmp_path, commands):
    folder = tmp_path / "run"
    assert run_once("run_glue.py", ["--seed", "1"], folder)["eval_accuracy"] == 0.1
    script, *arguments = commands[0][1:]
    assert Path(script).name == "run_glue.py" and Path(script).is_file()
    assert arguments == ["--seed", "1", "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    assert run_once("run_glue.py", ["--seed", "1"], folder)["eval_accuracy"] == 0.1
    assert len(commands) == 1
    with pytest.raises(ValueError, match="with the arguments --seed 2, got one with --seed 1: remove it"):
        run_once("run_glue.py", ["--seed", "2"], folder)
    # One that was stopped has no model. It goes on, but not as another run.
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="with the arguments --seed 2, got one with --seed 1: remove it"):
        run_once("run_glue.py", ["--seed", "2"], folder)
    assert run_once("run_glue.py", ["--seed", "1"], folder)["eval_accuracy"] == 0.2


def test_recipes_of_pretraining_are_compared(tmp_path, commands, monkeypatch, capsys):
    recipes = [str(tmp_path / f"{name}.yaml") for name in ("base", "a", "b")]
    command = ["compare_pretraining.py", "--base_recipe", recipes[0], "--recipes", *recipes[1:], "--seeds", "1", "2"]
    command += ["--output_dir", str(tmp_path / "out"), "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_pretraining.main()
    assert commands[3][2:-4] == ["--recipe", recipes[0], recipes[2], "--dataset_name", "d", "--seed", "2"]
    compare_pretraining.main()
    assert len(commands) == 4
    # Recipe a has the first and the third run, b the second and the fourth.
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0] == "| recipe | image R@1 | image R@5 | image R@10 |"
    assert lines[2].startswith("| a | 20.0 (10.0-30.0) |") and lines[3].startswith("| b | 30.0 (20.0-40.0) |")
    assert (tmp_path / "out" / "comparison.png").exists()
    assert "comparison.json, comparison.md, comparison.png" in capsys.readouterr().out


def test_starting_points_of_pretraining_are_compared(tmp_path, commands, monkeypatch):
    recipe = str(tmp_path / "a.yaml")
    command = ["compare_pretraining.py", "--recipes", recipe, "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    command += ["--models", "BERT=--bert_name_or_path b", "scratch=--tokenizer_name b", "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_pretraining.main()
    assert [command[2:-3] for command in commands] == [
        ["--recipe", recipe, "--dataset_name", "d", *own, "--seed", "1", "--output_dir"]
        for own in (["--bert_name_or_path", "b"], ["--tokenizer_name", "b"])
    ]
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines[2:]] == ["| a-BERT", "| a-scratch"]


def test_parts_of_the_training_data_are_compared(tmp_path, commands, monkeypatch):
    command = ["compare_on_retrieval.py", "--models", "pretrained=--model_name_or_path p", "none=--config_name c"]
    command += ["--train_percents", "10", "100", "--seeds", "1", "2", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--", "--dataset_name", "d"])
    compare_on_retrieval.main()
    assert commands[0][2:-4] == [
        *("--do_train", "--do_eval", "--dataset_name", "d", "--model_name_or_path", "p"),
        *("--train_split", "train[:10%]", "--seed", "1"),
    ]
    assert commands[3][-10:-4] == ["--config_name", "c", "--train_split", "train", "--seed", "1"]
    # The runs reach 0.1, 0.2, ... in this order: 10 % of both models, 100 % of both, with the first seed, then again.
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert results["none"]["10"]["2"]["eval_image_recall_at_1"] == pytest.approx(0.6)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("| model | training images (%) | caption → image R@1 |")
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| pretrained", "10", "30.0 ± 28.3"],  # of 10 and 50
        ["| pretrained", "100", "50.0 ± 28.3"],
        ["| none", "10", "40.0 ± 28.3"],
        ["| none", "100", "60.0 ± 28.3"],
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of_pairs_are_compared(tmp_path, commands, monkeypatch):
    command = ["run_title_retrieval.py", "--models", "one=--model_name_or_path p", "--train_pairs", "1000", "2000"]
    command += ["--seeds", "1", "--output_dir", str(tmp_path), "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    run_title_retrieval.main()
    assert commands[1][-8:-4] == ["--max_train_samples", "2000", "--seed", "1"]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "| model | training pairs | P@5 | R@1 | R@5 | R@10 |"
    assert lines[3] == "| one | 2,000 | 4.0 | 20.0 | 20.0 | 20.0 |"


def answers_of(scores: list[list[float]], images: str) -> list[list[dict]]:
    return [[{"image_id": i, "score": value} for i, value in zip(images, run, strict=True)] for run in scores]


def test_gap_by_hand():
    # Image a has three questions, all better with regions by 1; image b one question, worse by 1.
    answers = {
        "with_regions": answers_of([[1, 1, 1, 0], [1, 1, 1, 0]], "aaab"),
        "question_only": answers_of([[0, 0, 0, 1], [0, 0, 0, 1]], "aaab"),
    }
    gap, low, high = compare_on_vqa.gap_between(answers, num_resamples=1_000)
    assert gap == 0.5
    # Drawn again, the images are aa (1/4 of the draws), bb (1/4) or both.
    assert (low, high) == (-1.0, 1.0)
    # The same difference for every question leaves nothing to chance.
    same = {"with_regions": answers_of([[0.5] * 6], "abcdef"), "question_only": answers_of([[0.25] * 6], "abcdef")}
    assert compare_on_vqa.gap_between(same, num_resamples=1_000) == (0.25, 0.25, 0.25)


def test_gap_covers_the_truth_as_often_as_it_says():
    """95 of 100 intervals, give or take, hold the difference of which the questions were drawn."""
    generator = np.random.default_rng(0)
    num_right = 0
    for _ in range(100):
        differences = generator.normal(0.1, 1, 60)
        images = [str(image) for image in range(60)]
        answers = {
            "with_regions": [[{"image_id": i, "score": d} for i, d in zip(images, differences.tolist(), strict=True)]],
            "question_only": [[{"image_id": i, "score": 0.0} for i in images]],
        }
        _, low, high = compare_on_vqa.gap_between(answers, num_resamples=500)
        num_right += low <= 0.1 <= high
    assert 88 <= num_right <= 99


def test_regions_and_questions_alone_are_compared(tmp_path, commands, monkeypatch, capsys):
    run = comparison.subprocess.run

    def answer(command: list[str], check: bool):
        folder = Path(command[command.index("--output_dir") + 1])
        score = 0.0 if "--mask_regions" in command else 1.0
        rows = [{"image_id": i, "score": score, "type_baseline_score": 0.25} for i in "abc"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run(command, check=check)

    monkeypatch.setattr(comparison.subprocess, "run", answer)
    command = ["compare_on_vqa.py", "--seeds", "1", "2", "--output_dir", str(tmp_path), "--num_resamples", "100"]
    monkeypatch.setattr(sys, "argv", [*command, "--", "--dataset_name", "d"])
    compare_on_vqa.main()
    assert [command[4:-4] for command in commands[:2]] == [
        ["--dataset_name", "d", "--mask_regions", "--seed", "1"],
        ["--dataset_name", "d", "--seed", "1"],
    ]
    assert (tmp_path / "comparison.md").read_text().splitlines()[2:] == [
        "| most frequent answer of the type | 25.0 |",
        "| question only | 0.0 ± 0.0 |",
        "| with regions | 100.0 ± 0.0 |",
        "| gap (95 % interval) | +100.0 (+100.0 to +100.0) |",
    ]
    assert "Over 3 questions the gap is significant" in capsys.readouterr().out
    assert not list(tmp_path.rglob("model.safetensors"))


def test_arguments_of_runs_on_glue(tmp_path, commands):
    args = Namespace(
        output_dir=tmp_path,
        arguments=["--data_dir", "d"],
        task_arguments=[("sst2", ["--validation_fraction", "0.1"])],
        keep_models=False,
    )
    model = named_arguments("InterBERT before=--bert_name_or_path 'a b' --config_overrides num_text_layers=0")
    assert model == ("InterBERT before", ["--bert_name_or_path", "a b", "--config_overrides", "num_text_layers=0"])
    finetune(args, model, "sst2", 7)
    finetune(args, model, "rte", 7)
    assert commands[0][2:-4] == [
        *("--do_train", "--do_eval", "--task_name", "sst2", "--data_dir", "d", "--validation_fraction", "0.1"),
        *("--bert_name_or_path", "a b", "--config_overrides", "num_text_layers=0", "--seed", "7"),
    ]
    assert "--validation_fraction" not in commands[1]
    folder = tmp_path / "InterBERT_before-rte-seed7"
    assert (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    with pytest.raises(ArgumentTypeError, match="expected NAME=ARGUMENTS, got 'BERT'"):
        named_arguments("BERT")


def test_table_and_plot_by_hand(tmp_path):
    def on_rte(accuracy: float, raw: float) -> dict[str, float]:
        return {"eval_accuracy": accuracy, "eval_raw_accuracy": raw, "majority_accuracy": 0.527}

    results = {
        "BERT": {
            "stsb": {1: {"eval_pearson": 0.8, "eval_spearmanr": 0.75}},
            "rte": {1: on_rte(0.5, 0.52), 2: on_rte(0.6, 0.52), 3: on_rte(0.7, 0.55)},
        },
        "InterBERT": {"stsb": {1: {"eval_pearson": 0.9, "eval_spearmanr": 0.85}}, "rte": {}},
    }
    # Deviations of -10, 0 and 10 from the mean: sqrt(200 / 2) = 10. Of -1, -1 and 2: sqrt(6 / 2) = 1.73.
    columns = ("STS-B Pearson", "STS-B Spearman", "RTE accuracy")
    assert summarize(results) == [
        {"model": "most frequent class"} | dict(zip(columns, ("-", "-", "52.7"), strict=True)),
        {"model": "BERT"} | dict(zip(columns, ("80.0", "75.0", "60.0 ± 10.0"), strict=True)),
        {"model": "BERT, raw weights"} | dict(zip(columns, ("-", "-", "53.0 ± 1.7"), strict=True)),
        {"model": "InterBERT"} | dict(zip(columns, ("90.0", "85.0", "-"), strict=True)),
    ]
    assert format_scores([]) == "-"
    write_comparison(tmp_path, results, summarize(results))
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "| model | STS-B Pearson | STS-B Spearman | RTE accuracy |"
    assert lines[3] == "| BERT | 80.0 | 75.0 | 60.0 ± 10.0 |"
    draw_bars(scores(results), tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
