"""What the comparisons make of the runs that they compare."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import numpy as np
import psutil
import pytest

import compare_on_retrieval
import compare_on_vqa
import compare_pretraining
import comparison
import run_title_retrieval
from compare_on_glue import finetune, scores, summarize
from comparison import draw_bars, format_scores, named_arguments, run_once, write_comparison
from files import write_json_lines
from generate_scenes import write_scenes

EXAMPLES = str(comparison.EXAMPLES)


def finish(folder: Path, **results: float):
    """What a training script leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (folder / "all_results.json").write_text(json.dumps([{"epoch": 1, "eval_accuracy": 0.5}, {"epoch": 2} | results]))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=20, num_validation=4, num_test=4)
    return folder


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that are run; a run takes no time, and reaches its number as accuracy."""
    started: list[list[str]] = []

    def run(command: list[str]):
        started.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        reached = len(started) / 10
        recalls = {f"eval_image_recall_at_{k}": reached for k in (1, 5, 10)}
        recalls["eval_precision_at_5"] = reached / 5
        finish(folder, eval_accuracy=reached, eval_raw_accuracy=reached, majority_accuracy=0.4, **recalls)

    monkeypatch.setattr(comparison, "run_to_its_end", run)
    return started


def test_a_finished_run_is_not_repeated(tmp_path, commands):
    folder = tmp_path / "run"
    assert run_once("run_glue.py", ["--seed", "1"], folder, [])["eval_accuracy"] == 0.1
    script, *arguments = commands[0][1:]
    assert Path(script).name == "run_glue.py" and Path(script).is_file()
    assert arguments == ["--seed", "1", "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    assert run_once("run_glue.py", ["--seed", "1"], folder, [])["eval_accuracy"] == 0.1
    assert len(commands) == 1
    other = "must be a run of run_glue.py --seed 2, got one of run_glue.py --seed 1: remove it"
    with pytest.raises(ValueError, match=other):
        run_once("run_glue.py", ["--seed", "2"], folder, [])
    # One that was stopped has no model. It goes on, but not as another run.
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=other):
        run_once("run_glue.py", ["--seed", "2"], folder, [])
    assert run_once("run_glue.py", ["--seed", "1"], folder, [])["eval_accuracy"] == 0.2


def test_a_run_that_fails_is_no_result(tmp_path):
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        run_once("run_glue.py", [], tmp_path / "run", ["bash", "-c", "exit 3"])


def test_what_a_comparison_has_started_ends_with_it(tmp_path):
    """Also what the command itself has started, as `accelerate launch` does."""
    launcher = ["bash", "-c", "sleep 60 & echo $! > started; wait"]
    code = f"import comparison, pathlib; comparison.run_once('run_glue.py', [], pathlib.Path('run'), {launcher})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": EXAMPLES})
    started = tmp_path / "started"
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    try:  # where nobody reaps it, what has ended stays as a zombie
        assert psutil.Process(int(started.read_text())).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        pass


def test_a_token_is_not_written_down(tmp_path, commands):
    for arguments in (["--hub_token", "hf_x"], ["--hub-token=hf_x"], ["--hub_tok", "hf_x"]):
        with pytest.raises(ValueError, match="`--hub_token` would be written down with every run: log in"):
            run_once("run_glue.py", arguments, tmp_path / "run", [])
    assert not commands and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "checkpoint-5"])
def test_a_model_that_no_comparison_has_trained_is_no_run(tmp_path, commands, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a run of this comparison, with run.json, got a model without"):
        run_once("run_glue.py", [], tmp_path / "run", [])
    assert not commands


@pytest.mark.parametrize("changed", ["recipe.yaml", "queries.jsonl", "model", "dataset"])
def test_a_run_that_has_read_something_else_is_refused(tmp_path, commands, monkeypatch, changed):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("learning_rate: 1e-4\ndataset_name: dataset\nlr_decay_epochs: [1, 2]")
    Path("queries.jsonl").write_text("{}")
    Path("model").mkdir()
    Path("model", "model.safetensors").write_bytes(bytes(2**21))
    Path("dataset", "data").mkdir(parents=True)
    Path("dataset", "data", "train.parquet").touch()
    # Where the runs of a comparison are within a model's folder, they change nothing of the model.
    folder = Path("model", "comparison", "run")
    arguments = ["--recipe", "recipe.yaml", "--queries=queries.jsonl", "--model_name_or_path", "model"]
    run_once("run_image_retrieval.py", arguments, folder, [])
    run_once("run_image_retrieval.py", arguments, folder, [])
    assert len(commands) == 1
    change = {
        "recipe.yaml": lambda: Path("recipe.yaml").write_text("learning_rate: 2e-4\ndataset_name: dataset\n"),
        "queries.jsonl": lambda: Path("queries.jsonl").unlink(),
        "model": lambda: Path("model", "model.safetensors").write_bytes(bytes([1]) + bytes(2**21 - 1)),
        "dataset": lambda: Path("dataset", "data", "test.parquet").touch(),
    }
    change[changed]()
    with pytest.raises(ValueError, match=f"got one from before a change of {changed}: remove it, or choose another"):
        run_once("run_image_retrieval.py", arguments, folder, [])
    assert len(commands) == 1


def test_runs_are_started_by_a_launcher(tmp_path, commands, monkeypatch):
    command = ["compare_pretraining.py", "--recipes", "a.yaml", "--seeds", "1", "--output_dir", str(tmp_path)]
    command += ["--launcher", "accelerate launch --config_file 'a b.yaml'", "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_pretraining.main()
    assert commands[0][:4] == ["accelerate", "launch", "--config_file", "a b.yaml"]
    assert commands[0][4:7] == [str(comparison.EXAMPLES / "run_pretrain.py"), "--dataset_name", "d"]
    # Of other processes, the batch is another.
    command[command.index("--launcher") + 1] = "accelerate launch"
    with pytest.raises(ValueError, match="must be a run of accelerate launch run_pretrain.py .*, got one of "):
        compare_pretraining.main()


def test_one_run_is_not_taken_for_two(tmp_path, monkeypatch, capsys):
    command = ["compare_pretraining.py", "--recipes", "a.yaml", "--seeds", "1", "2", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        compare_pretraining.main()
    assert "--seeds: expected different values, got 1 2 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "launcher, message",
    [("", "expected a command, got ''"), ("a 'b", "No closing quotation")],
)
def test_bad_launchers(tmp_path, monkeypatch, capsys, launcher, message):
    command = ["compare_pretraining.py", "--recipes", "a.yaml", "--output_dir", str(tmp_path), "--launcher", launcher]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        compare_pretraining.main()
    assert message in capsys.readouterr().err


def test_recipes_of_pretraining_are_compared(tmp_path, commands, monkeypatch, capsys):
    recipes = [str(tmp_path / f"{name}.yaml") for name in ("base", "a", "b")]
    command = ["compare_pretraining.py", "--recipes", *recipes[1:], "--seeds", "1", "2"]
    command += ["--output_dir", str(tmp_path / "out"), "--", "--recipe", recipes[0], "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_pretraining.main()
    assert commands[3][2:-4] == [
        *("--recipe", recipes[0], "--dataset_name", "d"),  # before the one that is compared, which wins
        *("--recipe", recipes[2], "--seed", "2"),
    ]
    compare_pretraining.main()
    assert len(commands) == 4
    # Recipe a has the first and the third run, b the second and the fourth.
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0] == "| recipe | image R@1 | image R@5 | image R@10 |"
    assert lines[2].startswith("| a | 20.0 (10.0-30.0) |") and lines[3].startswith("| b | 30.0 (20.0-40.0) |")
    assert (tmp_path / "out" / "comparison.png").exists()
    assert "comparison.json, comparison.md, comparison.png" in capsys.readouterr().out


def test_what_is_pretrained_is_finetuned(tmp_path, commands, monkeypatch, capsys):
    recipes = [str(tmp_path / f"{name}.yaml") for name in "ab"]
    command = ["compare_pretraining.py", "--recipes", *recipes, "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    command += ["--finetuning", "run_vqa.py --dataset_name 'my questions'", "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_pretraining.main()
    pretrained = str(tmp_path / "out" / "a-seed1")
    assert [Path(command[1]).name for command in commands] == ["run_pretrain.py", "run_vqa.py"] * 2
    assert commands[1][2:-2] == [
        *("--do_train", "--do_eval", "--no_eval_every_epoch", "--dataset_name", "my questions"),
        *("--model_name_or_path", pretrained, "--seed", "1", "--output_dir", f"{pretrained}-finetuned"),
    ]
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0] == "| recipe | image R@1 | image R@5 | image R@10 | finetuned accuracy |"
    assert lines[2:] == ["| a | 10.0 | 10.0 | 10.0 | 20.0 |", "| b | 30.0 | 30.0 | 30.0 | 40.0 |"]
    command[command.index("--finetuning") + 1] = "run_glue.py"
    with pytest.raises(SystemExit):
        compare_pretraining.main()
    assert (
        "expected run_image_retrieval.py or run_vqa.py and its arguments, got 'run_glue.py'" in capsys.readouterr().err
    )


def test_starting_points_of_pretraining_are_compared(tmp_path, commands, monkeypatch):
    recipe = str(tmp_path / "a.yaml")
    command = ["compare_pretraining.py", "--recipes", recipe, "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    command += ["--models", "BERT=--bert_name_or_path b", "scratch=--tokenizer_name b", "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_pretraining.main()
    assert [command[2:-3] for command in commands] == [
        ["--dataset_name", "d", *own, "--recipe", recipe, "--seed", "1", "--output_dir"]
        for own in (["--bert_name_or_path", "b"], ["--tokenizer_name", "b"])
    ]
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines[2:]] == ["| a-BERT", "| a-scratch"]


def test_parts_of_the_training_data_are_compared(tmp_path, scenes, commands, monkeypatch):
    models = ["--models", "pretrained=--model_name_or_path p", "none=--bert_name_or_path b"]
    command = ["compare_on_retrieval.py", *models, "--launcher", "accelerate launch"]
    command += ["--train_percents", "10", "100", "--seeds", "1", "2", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--", "--dataset_name", str(scenes)])
    compare_on_retrieval.main()
    assert commands[0][:2] == ["accelerate", "launch"]
    assert commands[0][3:-4] == [
        *(
            "--do_train",
            "--do_eval",
            "--no_eval_every_epoch",
            "--dataset_name",
            str(scenes),
            "--model_name_or_path",
            "p",
        ),
        *("--num_train_images", "2", "--seed", "1"),
    ]
    assert commands[3][-10:-4] == ["--bert_name_or_path", "b", "--num_train_images", "20", "--seed", "1"]
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


def test_models_that_are_compared_are_finetuned_on_the_same_images(tmp_path, scenes, commands, monkeypatch):
    models = ["--models", "one=--model_name_or_path p", "half=--model_name_or_path p --train_split train[:50%]"]
    command = ["compare_on_retrieval.py", *models, "--output_dir", str(tmp_path), "--", "--dataset_name", str(scenes)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="the same images, got 20 for one and 10 for half, 10 of them the same"):
        compare_on_retrieval.main()
    assert not commands


def test_arguments_of_all_models_are_looked_at_before_the_first_run(tmp_path, scenes, commands, monkeypatch, capsys):
    models = ["--models", "one=--model_name_or_path p", "two=--model_name_or_path p --loss cosine"]
    command = ["compare_on_retrieval.py", *models, "--output_dir", str(tmp_path), "--", "--dataset_name", str(scenes)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        compare_on_retrieval.main()
    assert "argument --loss: invalid choice: 'cosine'" in capsys.readouterr().err
    assert not commands


@pytest.mark.parametrize("has_queries", [False, True])
def test_numbers_of_pairs_are_compared(tmp_path, scenes, commands, monkeypatch, has_queries):
    command = ["run_title_retrieval.py", "--models", "one=--model_name_or_path p", "--train_pairs", "10", "20"]
    command += ["--seeds", "1", "--output_dir", str(tmp_path), "--launcher", "python -u"]
    command += ["--", "--dataset_name", str(scenes), "--caption_column", "captions_zh"]
    monkeypatch.setattr(sys, "argv", [*command, *(["--queries", "queries.jsonl"] if has_queries else [])])
    run_title_retrieval.main()
    assert commands[1][:2] == ["python", "-u"]
    assert commands[1][-8:-4] == ["--num_train_images", "20", "--seed", "1"]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    # One image is right for a title: precision at 5 is a fifth of the recall.
    if has_queries:
        assert lines[0] == "| model | training images | P@5 | R@1 | R@5 | R@10 |"
        assert lines[3] == "| one | 20 | 4.0 | 20.0 | 20.0 | 20.0 |"
    else:
        assert lines[0] == "| model | training images | R@1 | R@5 | R@10 |"
        assert lines[3] == "| one | 20 | 20.0 | 20.0 | 20.0 |"


def test_more_pairs_than_there_are_images(tmp_path, scenes, commands, monkeypatch):
    command = ["run_title_retrieval.py", "--models", "one=--model_name_or_path p", "--train_pairs", "10", "1000"]
    command += ["--output_dir", str(tmp_path), "--", "--dataset_name", str(scenes)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="`--train_pairs` 1,000 needs as many images .*, got 20"):
        run_title_retrieval.main()
    assert not commands


def answers_of(scores: list[list[float]], images: str) -> list[compare_on_vqa.Answers]:
    """Of runs that differ in the seed, the scores of questions 0, 1, 2, ... about these images."""
    return [
        {(image, number): {"score": score} for number, (image, score) in enumerate(zip(images, run, strict=True))}
        for run in scores
    ]


def test_gap_by_hand():
    # Image a has three questions, all better with regions by 1; image b one question, worse by 1.
    answers = {
        "with_regions": answers_of([[1, 1, 1, 0], [1, 1, 1, 0]], "aaab"),
        "question_only": answers_of([[0, 0, 0, 1], [0, 0, 0, 1]], "aaab"),
    }
    # Drawn again, the images are aa (1/4 of the draws), bb (1/4) or both.
    assert compare_on_vqa.gap_between(answers, num_resamples=1_000) == (0.5, -1.0, 1.0, [0.5, 0.5])
    # The same difference for every question leaves nothing to chance.
    same = {"with_regions": answers_of([[0.5] * 6], "abcdef"), "question_only": answers_of([[0.25] * 6], "abcdef")}
    assert compare_on_vqa.gap_between(same, num_resamples=1_000) == (0.25, 0.25, 0.25, [0.25])


def test_the_interval_holds_what_other_seeds_would_give():
    # All questions of a seed differ alike: by 0, 0.3, 0.6. What is left is Student's interval of their mean, with
    # standard deviation 0.3, 2 degrees of freedom and the 97.5 % point 4.303: 4.303 * 0.3 / sqrt(3) = 0.745.
    answers = {
        "with_regions": answers_of([[0.2] * 4, [0.5] * 4, [0.8] * 4], "aabc"),
        "question_only": answers_of([[0.2] * 4] * 3, "aabc"),
    }
    gap = compare_on_vqa.gap_between(answers, num_resamples=100_000)
    assert gap.of_seeds == pytest.approx([0, 0.3, 0.6]) and gap.mean == pytest.approx(0.3)
    assert (gap.low, gap.high) == pytest.approx((0.3 - 0.745, 0.3 + 0.745), abs=0.03)


def test_scores_of_one_question_are_compared():
    with_regions, question_only = answers_of([[1, 0, 0.5], [1, 0.5, 0.25]], "abc")
    answers = {"with_regions": [with_regions], "question_only": [question_only]}
    gap = compare_on_vqa.gap_between(answers, num_resamples=100)
    assert gap.mean == pytest.approx(-0.25 / 3)
    # Another order changes nothing; another question is refused.
    turned = {"with_regions": [with_regions], "question_only": [dict(reversed(question_only.items()))]}
    assert compare_on_vqa.gap_between(turned, num_resamples=100) == gap
    with_regions["c", 7] = with_regions.pop(("c", 2))
    with pytest.raises(ValueError, match=r"with the same questions, got 2 .* question_only lacks .*: \[\('c', 2\), "):
        compare_on_vqa.gap_between(answers, num_resamples=100)


@pytest.mark.parametrize("seed_deviation", [0, 0.015])
def test_gap_covers_the_truth_as_often_as_it_says(seed_deviation):
    """Of 100 intervals, 95 or more hold the difference of which questions and seeds were drawn, give or take."""
    generator = np.random.default_rng(0)
    num_right = 0
    for _ in range(300):
        # The mean over 60 images deviates by 1 point.
        of_images = generator.normal(0.1, 0.01 * 60**0.5, 60)
        with_regions = [(of_images + generator.normal(0, seed_deviation)).tolist() for _ in range(3)]
        question_only = [[generator.normal(0, seed_deviation)] * 60 for _ in range(3)]
        images = "".join(map(chr, range(60)))
        answers = {
            "with_regions": answers_of(with_regions, images),
            "question_only": answers_of(question_only, images),
        }
        gap = compare_on_vqa.gap_between(answers, num_resamples=500)
        num_right += gap.low <= 0.1 <= gap.high
    assert 0.92 <= num_right / 300 <= 0.99


def write_answers(run):
    """Stands in for runs that answer three questions each, with regions always rightly."""

    def answer(command: list[str]):
        folder = Path(command[command.index("--output_dir") + 1])
        score = 0.0 if "--mask_regions" in command else 1.0
        baselines = {"type_baseline_score": 0.25, "question_baseline_score": 0.5}
        # Only a line feed ends a line.
        rows = [{"image_id": i, "question_id": n, "question": "a\u2028b", "score": score} for n, i in enumerate("abc")]
        rows = [row | baselines for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / "eval_predictions.jsonl", rows)
        run(command)

    return answer


def test_regions_and_questions_alone_are_compared(tmp_path, commands, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "run_to_its_end", write_answers(comparison.run_to_its_end))
    command = ["compare_on_vqa.py", "--seeds", "1", "2", "--output_dir", str(tmp_path), "--num_resamples", "100"]
    command += ["--launcher", "accelerate launch", "--", "--dataset_name", "d"]
    monkeypatch.setattr(sys, "argv", command)
    compare_on_vqa.main()
    assert commands[0][:2] == ["accelerate", "launch"]
    assert [command[6:-4] for command in commands[:2]] == [
        ["--dataset_name", "d", "--mask_regions", "--seed", "1"],
        ["--dataset_name", "d", "--seed", "1"],
    ]
    assert (tmp_path / "comparison.md").read_text().splitlines()[2:] == [
        "| most frequent answer of the type | 25.0 |",
        "| most frequent answer to the same question | 50.0 |",
        "| question only | 0.0 ± 0.0 |",
        "| with regions | 100.0 ± 0.0 |",
        "| question only, raw weights | 20.0 ± 14.1 |",  # of 10 and 30
        "| with regions, raw weights | 30.0 ± 14.1 |",
        "| gap (95 % interval) | +100.0 (+100.0 to +100.0) |",
        "| gap of each seed | +100.0, +100.0 |",
    ]
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert results["gap"] == 100 and results["interval"] == [100, 100] and results["gap_of_each_seed"] == [100, 100]
    output = capsys.readouterr().out
    assert "Over 3 questions and 2 seeds the gap is significant" in output and "one seed" not in output
    assert not list(tmp_path.rglob("model.safetensors"))


def test_with_one_seed_it_is_said_what_the_interval_leaves_out(tmp_path, commands, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "run_to_its_end", write_answers(comparison.run_to_its_end))
    command = ["compare_on_vqa.py", "--seeds", "1", "--output_dir", str(tmp_path), "--num_resamples", "100"]
    monkeypatch.setattr(sys, "argv", [*command, "--", "--dataset_name", "d"])
    compare_on_vqa.main()
    assert "With one seed, the interval is about these two models" in capsys.readouterr().out


def test_arguments_of_runs_on_glue(tmp_path, commands):
    args = Namespace(
        output_dir=tmp_path,
        arguments=["--data_dir", "d"],
        task_arguments=[("sst2", ["--validation_fraction", "0.1"])],
        keep_models=False,
        launcher=["accelerate", "launch"],
    )
    model = named_arguments("InterBERT before=--bert_name_or_path 'a b' --config_overrides num_text_layers=0")
    assert model == ("InterBERT before", ["--bert_name_or_path", "a b", "--config_overrides", "num_text_layers=0"])
    finetune(args, model, "sst2", 7)
    finetune(args, model, "rte", 7)
    assert commands[0][:2] == ["accelerate", "launch"]
    assert commands[0][3:-4] == [
        *(
            "--do_train",
            "--do_eval",
            "--no_eval_every_epoch",
            "--task_name",
            "sst2",
            "--data_dir",
            "d",
            "--validation_fraction",
            "0.1",
        ),
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
