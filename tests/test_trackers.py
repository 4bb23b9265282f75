"""What trackers are told of a pretraining: every number, once, also when the pretraining was killed on the way."""

import json
import sqlite3
import statistics
import time
from pathlib import Path

import pytest
import torch
import yaml
from killing import killed_at
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from test_resuming import TINY, TWO_PROCESSES, arguments, finish
from test_resuming import pretrain as pretrain
from transformers import AutoTokenizer, BertConfig, BertModel

from generate_scenes import write_scenes
from training import OutputArguments, TrainingArguments, make_accelerator

STEPS_PER_EPOCH = 5  # 16 images with 5 captions each, in batches of 16
OBJECTIVES = {f"{objective}_{measure}" for objective in ("mlm", "region", "itm") for measure in ("loss", "accuracy")}
RANKINGS = {
    f"{direction}_{name}"
    for direction in ("image", "text")
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank")
}
TRAINING = {"loss", "gradient_norm", "padding"} | OBJECTIVES
# These are never the same twice.
MEASURED = {"samples_per_second", "tokens_per_second", "loading_share", "memory_gib"}
LOG_ALL = ("--with_tracking", "--report_to", "tensorboard", "--logging_steps", "1")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=16, num_validation=4, num_test=4)
    return folder


def read_tensorboard(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """By name the steps and values that TensorBoard shows of the run."""
    events = EventAccumulator(str(output_dir / "interbert"), size_guidance={SCALARS: 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def steps_of(points: list[tuple[int, float]]) -> list[int]:
    return [step for step, _ in points]


def test_tensorboard_has_every_number(scenes, tmp_path, pretrain):
    options = ["--num_train_epochs", "2", "--lr_scheduler_type", "linear", "--hub_token", "secret"]
    pretrain(arguments(scenes, tmp_path / "out", *options, *LOG_ALL))
    scalars = read_tensorboard(tmp_path / "out")
    assert scalars.keys() == (
        {f"train/{name}" for name in TRAINING | MEASURED | {"learning_rate"}}
        | {f"epoch/train_{name}" for name in TRAINING}
        | {f"epoch/eval_{name}" for name in OBJECTIVES | RANKINGS}
    )
    every_step = list(range(1, 2 * STEPS_PER_EPOCH + 1))
    for name, points in scalars.items():
        if name.startswith("epoch/"):
            assert steps_of(points) == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH], name
        elif name in ("train/region_loss", "train/region_accuracy"):  # no region may be masked in a batch
            assert set(steps_of(points)) <= set(every_step), name
        else:
            assert steps_of(points) == every_step, name

    # Warm-up to 1e-3 in 3 steps, then down to 0 in 7: that of the step to come.
    expected = [1 / 3, 2 / 3, 1, *(i / 7 for i in range(6, -1, -1))]
    values = [value for _, value in scalars["train/learning_rate"]]
    assert values == pytest.approx([1e-3 * factor for factor in expected], abs=1e-9)
    # What the epochs tell is the mean of what the steps told.
    for name in ("loss", "gradient_norm"):
        values = [value for _, value in scalars[f"train/{name}"]]
        means = [statistics.mean(values[:STEPS_PER_EPOCH]), statistics.mean(values[STEPS_PER_EPOCH:])]
        assert [value for _, value in scalars[f"epoch/train_{name}"]] == pytest.approx(means, rel=1e-5)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for epoch, result in enumerate(results):
        told = {name.removeprefix("epoch/"): p[epoch][1] for name, p in scalars.items() if name.startswith("epoch/")}
        assert told == pytest.approx({name: value for name, value in result.items() if name not in ("epoch", "step")})
    for name in ("train/samples_per_second", "train/tokens_per_second", "train/memory_gib", "train/gradient_norm"):
        assert all(value > 0 for _, value in scalars[name]), name
    for name in ("train/loading_share", "train/padding"):
        assert all(0 < value < 1 for _, value in scalars[name]), name
    # A sample is at least [CLS], a token, [SEP], a region and the whole image.
    for (_, samples), (_, tokens) in zip(
        scalars["train/samples_per_second"], scalars["train/tokens_per_second"], strict=True
    ):
        assert tokens > 5 * samples

    (path,) = (tmp_path / "out" / "interbert").glob("*/hparams.yml")
    configuration = yaml.safe_load(path.read_text())
    assert configuration["learning_rate"] == 1e-3 and configuration["num_train_epochs"] == 2
    assert configuration["config_overrides"] == TINY and configuration["objectives"] == "['mlm,mom,itm']"
    assert "hub_token" not in configuration
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_learning_rate_of_what_came_from_bert(scenes, tmp_path, pretrain):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    overrides = "vision_num_attention_heads=2,vision_intermediate_size=64,num_vision_layers=1,pooler_size=16"
    command = [
        *("--bert_name_or_path", str(tmp_path / "bert"), "--tokenizer_name", str(scenes / "tokenizer")),
        *("--dataset_name", str(scenes), "--output_dir", str(tmp_path / "out"), "--config_overrides", overrides),
        *("--per_device_train_batch_size", "16", "--retrieval_eval_size", "0", "--max_train_steps", "4"),
        *("--learning_rate", "1e-3", "--num_warmup_steps", "2", "--lr_scheduler_type", "constant_with_warmup"),
    ]
    pretrain([*command, "--bert_learning_rate_scale", "0.1", *LOG_ALL])
    scalars = read_tensorboard(tmp_path / "out")
    for name, highest in (("train/learning_rate", 1e-3), ("train/learning_rate_1", 1e-4)):
        assert steps_of(scalars[name]) == [1, 2, 3, 4]
        assert [value for _, value in scalars[name]] == pytest.approx([highest / 2, *[highest] * 3])
    assert "train/learning_rate_2" not in scalars


def run_with_kills(pretrain, command: list[str]):
    """Dies in the middle of steps 3 (before the first checkpoint), 7, 11 and 12."""
    for kill in (2, 6, 10, 11):
        with killed_at(kill):
            pretrain(command)
        time.sleep(1)  # files of one process are read in the order of the seconds in which they were begun
    pretrain(command)


def test_tensorboard_of_a_killed_pretraining_is_that_of_an_undisturbed_one(scenes, tmp_path, pretrain):
    options = ["--num_train_epochs", "3", "--checkpointing_steps", "4"]
    pretrain(arguments(scenes, tmp_path / "undisturbed", *options, *LOG_ALL))
    run_with_kills(pretrain, arguments(scenes, tmp_path / "killed", *options, *LOG_ALL))
    scalars, expected = read_tensorboard(tmp_path / "killed"), read_tensorboard(tmp_path / "undisturbed")
    assert scalars.keys() == expected.keys()
    for name, points in scalars.items():
        assert steps_of(points) == steps_of(expected[name]), name
        if name.removeprefix("train/") not in MEASURED:
            values = [value for _, value in expected[name]]
            assert [value for _, value in points] == pytest.approx(values, rel=1e-5), name


def test_what_was_shown_together_stays_together(scenes, tmp_path, pretrain):
    """Losses are means over three steps, of which the first is before the checkpoint and the others after the kill."""
    options = ["--num_train_epochs", "2", "--checkpointing_steps", "4", *LOG_ALL, "--logging_steps", "3"]
    pretrain(arguments(scenes, tmp_path / "undisturbed", *options))
    killed = arguments(scenes, tmp_path / "killed", *options)
    with killed_at(4):
        pretrain(killed)
    pretrain(killed)
    points = read_tensorboard(tmp_path / "killed")["train/loss"]
    expected = read_tensorboard(tmp_path / "undisturbed")["train/loss"]
    assert steps_of(points) == [3, 6, 9]
    assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-5)


def test_two_processes_tell_once_what_both_did(scenes, tmp_path):
    options = ["--max_train_steps", "2", "--retrieval_eval_size", "0", *LOG_ALL]
    output = finish(arguments(scenes, tmp_path / "out", *options), TWO_PROCESSES)
    assert "2 process(es)." in output
    assert len(list((tmp_path / "out" / "interbert").glob("events.*"))) == 1
    scalars = read_tensorboard(tmp_path / "out")
    assert steps_of(scalars["train/loss"]) == [1, 2]
    (result,) = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert statistics.mean(v for _, v in scalars["train/loss"]) == pytest.approx(result["train_loss"], rel=1e-5)


@pytest.fixture
def make_with_tracker(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def make(report_to: str, with_tracking=True):
        output_args = OutputArguments(output_dir=str(tmp_path), with_tracking=with_tracking, report_to=[report_to])
        return make_accelerator(TrainingArguments(), output_args)

    return make


def test_trackers_are_chosen_by_name(make_with_tracker):
    assert "tensorboard" in [str(tracker) for tracker in make_with_tracker("all").log_with]
    assert [str(tracker) for tracker in make_with_tracker("tensorboard").log_with] == ["tensorboard"]
    assert make_with_tracker("tensorboard", with_tracking=False).log_with == []
    with pytest.raises(ValueError, match="nosuch.*tensorboard"):
        make_with_tracker("nosuch")


def test_trackio_goes_on_with_the_same_run(scenes, tmp_path, pretrain, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read when trackio is imported
    pytest.importorskip("trackio", reason="not in an extra: it brings a web server along")
    options = ["--num_train_epochs", "2", "--checkpointing_steps", "4", "--with_tracking", "--report_to", "trackio"]
    command = arguments(scenes, tmp_path / "out", *options, "--logging_steps", "1")
    with killed_at(6):
        pretrain(command)
    pretrain(command)
    with sqlite3.connect(tmp_path / "trackio" / "interbert.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        configurations = database.execute("select run_name, config from configs").fetchall()
    run_id = json.loads((tmp_path / "out" / "checkpoint-8" / "training_state.json").read_text())["run_id"]
    assert {run_name for run_name, _, _ in rows} == {f"out-{run_id}"}
    rows = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {step for step, metrics in rows if "train/loss" in metrics} == set(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert {step for step, metrics in rows if "epoch/train_loss" in metrics} == {5, 10}
    ((run_name, configuration),) = configurations
    assert run_name == f"out-{run_id}" and json.loads(configuration)["learning_rate"] == 1e-3
