"""The shared training loop, on a model of a few weights."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from training import (
    OutputArguments,
    RunningMeans,
    TrainingArguments,
    flat_config,
    format_table,
    make_accelerator,
    make_optimizer,
    save_atomically,
    train,
)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(2, 1)
        self.layer_norm = nn.LayerNorm(2)

    def forward(self, x):
        return self.matrix(self.layer_norm(x))


POINTS = [{"x": torch.tensor([float(i), float(i * i)]), "y": torch.tensor([float(i % 3)])} for i in range(8)]


def squared_error(model, batch):
    loss = ((model(batch["x"]) - batch["y"]) ** 2).mean()
    return {"loss": loss, "error": loss.sqrt()}


def run_training(tmp_path, end_epoch=None, begin_epoch=None, save=None, batch_size=4, steps=None, **arguments):
    training_args = TrainingArguments(per_device_train_batch_size=batch_size, **arguments)
    output_args = OutputArguments(
        output_dir=str(tmp_path / "out"), checkpointing_steps=str(steps) if steps else None, logging_steps=1
    )
    torch.manual_seed(0)
    model = Line()
    results = train(
        make_accelerator(training_args, output_args),
        model,
        DataLoader(POINTS, batch_size=batch_size),
        training_args,
        output_args,
        squared_error,
        begin_epoch or (lambda epoch: None),
        end_epoch or (lambda epoch, model, is_last: {}),
        save or (lambda model, folder: None),
    )
    return model, results


def test_weight_decay_spares_biases_and_layer_norms():
    model = Line()
    decayed, spared = make_optimizer(model, TrainingArguments(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.matrix.weight)]
    assert {id(p) for p in spared["params"]} == {
        id(model.matrix.bias),
        id(model.layer_norm.weight),
        id(model.layer_norm.bias),
    }


def test_training_follows_plain_pytorch(tmp_path):
    """Two epochs of two steps with warm-up and linear decay, against the same steps written out."""
    model, results = run_training(
        tmp_path, num_train_epochs=2, learning_rate=0.1, num_warmup_steps=1, weight_decay=0.0, max_grad_norm=0.5
    )
    torch.manual_seed(0)
    expected = Line()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1, eps=1e-6, weight_decay=0.0)
    losses = []
    for step in range(4):
        # 1 step of warm-up from 0, then linearly down to 0 after the 4th step.
        optimizer.param_groups[0]["lr"] = 0.1 * [0, 1, 2 / 3, 1 / 3][step]
        points = POINTS[:4] if step % 2 == 0 else POINTS[4:]
        batch = {name: torch.stack([point[name] for point in points]) for name in ("x", "y")}
        loss = squared_error(expected, batch)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    for parameter, value in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, value)
    assert [(result["epoch"], result["step"]) for result in results] == [(1, 2), (2, 4)]
    assert math.isclose(results[1]["train_loss"], (losses[2] + losses[3]) / 2, rel_tol=1e-5)


def test_accumulated_batches_train_like_one_large_batch(tmp_path):
    large, _ = run_training(tmp_path, batch_size=4, num_train_epochs=2)
    small, results = run_training(tmp_path, batch_size=2, num_train_epochs=2, gradient_accumulation_steps=2)
    assert results[-1]["step"] == 4
    for parameter, value in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(parameter, value)


def test_max_train_steps_ends_the_training(tmp_path):
    epochs = []
    _, results = run_training(
        tmp_path,
        begin_epoch=epochs.append,
        end_epoch=lambda epoch, model, is_last: {"last": is_last},
        num_train_epochs=5,
        max_train_steps=3,
    )
    assert epochs == [0, 1]
    assert [(result["step"], result["last"]) for result in results] == [(2, False), (3, True)]
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == results


def test_results_of_finished_epochs_survive_a_failure(tmp_path):
    def fail_in_the_second(epoch):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, begin_epoch=fail_in_the_second, num_train_epochs=3)
    assert [result["epoch"] for result in json.loads((tmp_path / "out" / "all_results.json").read_text())] == [1]


def test_running_means_count_each_loss_by_itself():
    means = RunningMeans()
    means.update({"loss": torch.tensor(1.0)})
    means.update({"loss": torch.tensor(3.0), "region_loss": torch.tensor(5.0)})
    assert means.compute(Accelerator(cpu=True)) == {"loss": 2.0, "region_loss": 5.0}


def test_checkpoints_are_complete_or_absent(tmp_path):
    def save(model, folder):
        (folder / "half").touch()
        if folder.name.startswith("step_4"):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_training(tmp_path, save=save, steps=2, num_train_epochs=3)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["all_results.json", "step_2", "step_4.unfinished"]

    # The next checkpoint of that name takes the place of what was left behind.
    accelerator = make_accelerator(TrainingArguments(), OutputArguments(output_dir=str(tmp_path / "out")))
    save_atomically(accelerator, Line(), tmp_path / "out" / "step_4", lambda model, folder: (folder / "new").touch())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all_results.json", "step_2", "step_4"]
    assert [path.name for path in (tmp_path / "out" / "step_4").iterdir()] == ["new"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"per_device_train_batch_size": 0}, "`--per_device_train_batch_size` must be at least 1, got 0"),
        ({"num_train_epochs": -1}, "`--num_train_epochs` must be at least 1, got -1"),
        ({"max_train_steps": 0}, "`--max_train_steps` must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "`--max_grad_norm` must be positive, got 0.0"),
        ({"gradient_accumulation_steps": 0}, "`--gradient_accumulation_steps` must be at least 1, got 0"),
    ],
)
def test_bad_training_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**arguments)


def test_a_trained_model_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="already holds a model"):
        OutputArguments(output_dir=str(tmp_path))
    OutputArguments(output_dir=str(tmp_path), overwrite_output_dir=True)


def test_bad_checkpointing_steps(tmp_path):
    with pytest.raises(ValueError, match="must be a positive number or 'epoch', got 'often'"):
        OutputArguments(output_dir=str(tmp_path), checkpointing_steps="often")


def test_trackers_get_plain_values_and_no_token(tmp_path):
    config = flat_config(OutputArguments(output_dir=str(tmp_path), hub_token="secret"), TrainingArguments())
    assert "hub_token" not in config and "secret" not in config.values()
    assert config["max_train_steps"] == "None" and config["seed"] == 42


def test_format_table():
    table = format_table([{"epoch": 1, "loss": 0.51234}, {"epoch": 12, "loss": 10.0}])
    assert table.splitlines() == [
        "epoch    loss",
        "-----  ------",
        "    1   0.512",
        "   12  10.000",
    ]
