"""Pretraining that is stopped at any moment and goes on, on one process, on two, and from a stream."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from killing import assert_same_weights, killed_at, weights

import run_pretrain
from generate_scenes import write_scenes
from processing import load_region_dataset
from training import TERMINATED

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = (
    "hidden_size=32,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=64,vision_intermediate_size=64,"
    "num_hidden_layers=1,num_text_layers=1,num_vision_layers=1,pooler_size=16"
)
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=48, num_validation=8, num_test=4)
    return folder


def arguments(scenes: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("--dataset_name", str(scenes), "--tokenizer_name", str(scenes / "tokenizer"), "--config_overrides", TINY),
        *("--output_dir", str(output_dir), "--per_device_train_batch_size", "16", "--retrieval_eval_size", "4"),
        *("--learning_rate", "1e-3", "--num_warmup_steps", "3", "--resume_from_checkpoint", "latest"),
        *more,
    ]


def assert_same_results(folder: Path, expected: Path):
    one, other = (json.loads((path / "all_results.json").read_text()) for path in (folder, expected))
    assert len(one) == len(other)
    for result, expected_result in zip(one, other, strict=True):
        assert result == pytest.approx(expected_result, rel=1e-5)


@pytest.fixture
def pretrain(monkeypatch):
    """Runs the script in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(command: list[str]):
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *command])
        run_pretrain.main()

    return run


@pytest.mark.parametrize(
    "options",
    [
        ["--objectives", "mlm,mom,itm", "msm,mrm,itm", "--stage_epochs", "1", "1", "--group_by_length"],
        ["--gradient_accumulation_steps", "2", "--num_train_epochs", "2", "--dataloader_num_workers", "2"],
        ["--streaming", "--objectives", "mlm,mom,itm", "msm,mrm,itm", "--stage_epochs", "1", "1"],
        ["--streaming", "--dataloader_num_workers", "1", "--num_train_epochs", "2"],
    ],
    ids=["two_stages_grouped", "accumulation_and_workers", "stream_in_two_stages", "stream_with_worker"],
)
def test_a_killed_pretraining_ends_with_the_same_weights(scenes, tmp_path, pretrain, options):
    pretrain(arguments(scenes, tmp_path / "undisturbed", *options))
    killed = arguments(scenes, tmp_path / "killed", *options, "--checkpointing_steps", "4", "--save_total_limit", "1")
    for kill in (5, 9, 13):
        with killed_at(kill):
            pretrain(killed)
    pretrain(killed)
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    assert_same_results(tmp_path / "killed", tmp_path / "undisturbed")


def start(command: list[str], launch=(), **options) -> subprocess.Popen:
    environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launch, str(REPOSITORY / "examples" / "run_pretrain.py"), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(command: list[str], launch=()) -> str:
    process = start(command, launch)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    return output


def wait_for(path: Path, process: subprocess.Popen):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.005)


@pytest.mark.parametrize(
    "options", [[], ["--dataloader_num_workers", "2"]], ids=["this_process", "the_whole_group_with_workers"]
)
def test_sigterm(scenes, tmp_path, options):
    command = arguments(scenes, tmp_path / "out", "--num_train_epochs", "500", "--checkpointing_steps", "5", *options)
    process = start(command, start_new_session=True)
    wait_for(tmp_path / "out" / "checkpoint-5", process)
    if options:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TERMINATED, output[-4000:]
    assert "--resume_from_checkpoint latest goes on" in output
    assert not list((tmp_path / "out").glob("*.unfinished"))


def kill_all(process: subprocess.Popen):
    """The launcher begins new sessions: its processes are found as its descendants."""
    for member in [process, *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("launch", [(), TWO_PROCESSES], ids=["one_process", "two_processes"])
def test_sigkill_at_random_steps(scenes, tmp_path, launch):
    options = ["--num_train_epochs", "4", "--checkpointing_steps", "3"]
    num_processes = 2 if launch else 1
    output = finish(arguments(scenes, tmp_path / "undisturbed", *options), launch)
    assert f"{num_processes} process(es)." in output
    num_steps = json.loads((tmp_path / "undisturbed" / "all_results.json").read_text())[-1]["step"]
    killed = arguments(scenes, tmp_path / "killed", *options)
    kills = sorted(random.sample(range(1, num_steps // 3), 3))
    print(f"Killed after the checkpoints of steps {[3 * kill for kill in kills]} of {num_steps}.")
    for kill in kills:
        process = start(killed, launch)
        wait_for(tmp_path / "killed" / f"checkpoint-{3 * kill}", process)
        time.sleep(random.uniform(0, 0.1))
        kill_all(process)
    output = finish(killed, launch)
    assert "Going on from" in output and f"{num_processes} process(es)." in output
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    assert_same_results(tmp_path / "killed", tmp_path / "undisturbed")


def test_two_processes_take_the_steps_of_one_that_accumulates(scenes, tmp_path):
    """20 steps without dropout: the same micro-batches with the same masks."""
    no_dropout = ",".join(
        f"{name}=0"
        for name in (
            "hidden_dropout_prob",
            "vision_hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "vision_attention_probs_dropout_prob",
        )
    )
    options = ["--config_overrides", f"{TINY},{no_dropout}", "--num_train_epochs", "4", "--max_train_steps", "20"]
    one = finish(arguments(scenes, tmp_path / "one", *options, "--gradient_accumulation_steps", "2"))
    two = finish(arguments(scenes, tmp_path / "two", *options), TWO_PROCESSES)
    assert "1 process(es)." in one and "2 process(es)." in two
    for folder in ("one", "two"):
        assert json.loads((tmp_path / folder / "all_results.json").read_text())[-1]["step"] == 20
    finish(arguments(scenes, tmp_path / "none", *options, "--max_train_steps", "1", "--learning_rate", "0"))
    expected, initial = weights(tmp_path / "one"), weights(tmp_path / "none")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    name = "interbert.interaction_layers.0.intermediate.weight"
    assert (expected[name] - initial[name]).abs().max() > 1e-3


def test_processes_without_a_pair_to_evaluate_do_not_wait_for_ever(scenes, tmp_path):
    options = ["--validation_split", "validation[:1]", "--max_train_steps", "1", "--objectives", "mlm,mom"]
    options += ["--caption_column", "one_caption", "--retrieval_eval_size", "0"]
    for split in ("train", "validation"):
        regions = load_region_dataset(scenes, split).dataset.select(range(8))
        one = [captions[0] for captions in regions["captions"]]
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        regions.remove_columns(["captions", "captions_zh"]).add_column("one_caption", one).to_parquet(path)
    command = arguments(scenes, tmp_path / "out", *options, "--dataset_name", str(tmp_path / "data"))
    output = finish(command, TWO_PROCESSES)
    assert "1 captions to evaluate on; 2 process(es)." in output
