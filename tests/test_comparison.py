"""What the comparisons make of the runs that they compare."""

import json
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import pytest

import compare_pretraining
import comparison
from compare_on_glue import finetune, format_scores, named_arguments, scores, summarize
from comparison import draw_bars, run_once, write_comparison


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
        finish(folder, eval_accuracy=reached, eval_majority_accuracy=0.4, **recalls)
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
    # One that was stopped has no model.
    (folder / "config.json").unlink()
    assert run_once("run_glue.py", ["--seed", "2"], folder)["eval_accuracy"] == 0.2


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
    def on_rte(accuracy: float, averaged: float) -> dict[str, float]:
        return {"eval_accuracy": accuracy, "eval_averaged_accuracy": averaged, "eval_majority_accuracy": 0.527}

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
        {"model": "BERT, averaged"} | dict(zip(columns, ("-", "-", "53.0 ± 1.7"), strict=True)),
        {"model": "InterBERT"} | dict(zip(columns, ("90.0", "85.0", "-"), strict=True)),
    ]
    assert format_scores([]) == "-"
    write_comparison(tmp_path, results, summarize(results))
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "| model | STS-B Pearson | STS-B Spearman | RTE accuracy |"
    assert lines[3] == "| BERT | 80.0 | 75.0 | 60.0 ± 10.0 |"
    draw_bars(scores(results), tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
