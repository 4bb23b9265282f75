"""The same training under plain data parallelism, FSDP, and torch.compile, from the configurations of the examples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resuming import TINY, arguments

from generate_scenes import write_scenes
from modeling_interbert import InterBERTForPreTraining
from modeling_interbert.modeling_interbert import InterBERTLayer

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = str(REPOSITORY / "examples" / "run_pretrain.py")
CONFIGS = REPOSITORY / "examples" / "accelerate_configs"
NO_DROPOUT = ",".join(
    f"{prefix}{name}_dropout_prob=0" for prefix in ("", "vision_") for name in ("hidden", "attention_probs")
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    # Neither the 35 captions nor the 7 images of the validation split can be divided by two.
    write_scenes(folder, num_train=24, num_validation=7, num_test=4)
    return folder


def launch(config: Path, command: list[str], script=(SCRIPT,)) -> str:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("--main_process_port", "0", *script, *command),
        ],
        env=dict(os.environ) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


def assert_close(folder: Path, expected: Path, atol: float):
    one, other = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol)


@pytest.mark.slow
def test_fsdp_trains_what_data_parallelism_trains(scenes, tmp_path):
    """The FSDP configuration of the examples, cut down to two CPU processes, stopped and resumed on the way."""
    config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
    fsdp_config = tmp_path / "fsdp.yaml"
    fsdp_config.write_text(yaml.safe_dump(config | {"num_processes": 2, "mixed_precision": "no"}))
    options = ["--config_overrides", f"{TINY},{NO_DROPOUT}", "--num_train_epochs", "2", "--checkpointing_steps", "3"]
    options += ["--lr_scheduler_type", "constant_with_warmup"]
    output = launch(CONFIGS / "two_cpu_processes.yaml", arguments(scenes, tmp_path / "ddp", *options))
    assert "2 process(es)." in output

    fsdp = (str(REPOSITORY / "tests" / "fsdp_on_cpu.py"), SCRIPT)
    output = launch(fsdp_config, arguments(scenes, tmp_path / "fsdp", *options, "--max_train_steps", "3"), fsdp)
    assert "2 process(es)." in output
    assert (tmp_path / "fsdp" / "checkpoint-3" / "pytorch_model_fsdp.bin").exists()
    launch(fsdp_config, arguments(scenes, tmp_path / "fsdp", *options), fsdp)
    assert_close(tmp_path / "fsdp", tmp_path / "ddp", atol=1e-5)
    results = [json.loads((tmp_path / name / "all_results.json").read_text())[-1] for name in ("fsdp", "ddp")]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    for folder in (tmp_path / "fsdp", tmp_path / "fsdp" / "checkpoint-3"):
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"]["AutoModelForPreTraining"] == "modeling_interbert.InterBERTForPreTraining"
        assert not list(folder.glob("_fsdp*"))
        _, info = InterBERTForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_one_cpu_configuration(scenes, tmp_path):
    output = launch(CONFIGS / "one_cpu.yaml", arguments(scenes, tmp_path / "out", "--max_train_steps", "1"))
    assert "1 process(es)." in output


def test_fsdp_wraps_layers_that_there_are():
    layer = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert layer == InterBERTLayer.__name__


@pytest.mark.slow
def test_compiled_training_is_the_same(scenes, tmp_path):
    options = ["--config_overrides", f"{TINY},{NO_DROPOUT}", "--max_train_steps", "6"]
    launch(CONFIGS / "one_cpu.yaml", arguments(scenes, tmp_path / "eager", *options))
    launch(CONFIGS / "one_cpu.yaml", arguments(scenes, tmp_path / "compiled", *options, "--torch_compile"))
    assert_close(tmp_path / "compiled", tmp_path / "eager", atol=1e-5)
