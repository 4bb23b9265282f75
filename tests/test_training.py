"""The shared training loop, on a model of a few weights."""

import json
import math
import os
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from killing import Killed
from safetensors.torch import load_file, save_file
from torch import nn

from checkpointing import CheckpointFolder, find_damage
from data_loading import DatasetLoader
from processing import ShuffledBatchSampler
from training import (
    TERMINATED,
    OutputArguments,
    Totals,
    TrainingArguments,
    TrainingRun,
    add_totals,
    flat_config,
    format_table,
    make_accelerator,
    make_optimizer,
    make_scheduler,
    means_of,
)


class Line(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.config = dropout
        self.matrix = nn.Linear(2, 1)
        self.layer_norm = nn.LayerNorm(2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.matrix(self.dropout(self.layer_norm(x)))

    def tie_weights(self):
        pass

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").touch()


class NoProcessor:
    def save_pretrained(self, folder):
        pass


class Points(torch.utils.data.Dataset):
    """8 points with their squares; `nan_at` has no number."""

    def __init__(self, nan_at=None):
        self.nan_at = nan_at

    def __len__(self):
        return 8

    def __getitem__(self, i):
        y = math.nan if i == self.nan_at else i % 3
        return {"id": i, "x": torch.tensor([float(i), float(i * i)]), "y": torch.tensor([float(y)])}

    def set_epoch(self, epoch):
        self.epoch = epoch


def collate(points):
    inputs = {name: torch.stack([point[name] for point in points]) for name in ("x", "y")}
    return {"inputs": inputs, "ids": [point["id"] for point in points]}


def squared_error(model, inputs):
    loss = ((model(inputs["x"]) - inputs["y"]) ** 2).mean()
    return loss, {"error": (loss.detach().sqrt() * len(inputs["x"]), len(inputs["x"]))}


def make_run(
    output_dir,
    *,
    batch_size=4,
    dropout=0.0,
    points=None,
    compute_losses=squared_error,
    begin_epoch=lambda epoch: None,
    end_epoch=lambda epoch, model, is_last: {},
    checkpointing_steps=None,
    save_total_limit=None,
    resume_from_checkpoint=None,
    settings=None,
    fixed_arguments=(),
    logging_steps=1,
    **arguments,
):
    training_args = TrainingArguments(per_device_train_batch_size=batch_size, **arguments)
    output_args = OutputArguments(
        output_dir=str(output_dir),
        overwrite_output_dir=True,
        checkpointing_steps=checkpointing_steps,
        save_total_limit=save_total_limit,
        resume_from_checkpoint=resume_from_checkpoint,
        logging_steps=logging_steps,
    )
    torch.manual_seed(0)
    points = points or Points()
    sampler = ShuffledBatchSampler(len(points), batch_size, batches_per_step=training_args.gradient_accumulation_steps)
    return TrainingRun(
        make_accelerator(training_args, output_args),
        Line(dropout),
        NoProcessor(),
        DatasetLoader(points, sampler, collate),
        training_args,
        output_args,
        compute_losses,
        begin_epoch,
        end_epoch,
        settings=settings or flat_config(training_args),
        recipe="seed: 42\n",
        fixed_arguments=fixed_arguments,
    )


def parameters(run):
    return list(run.model.parameters())


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


def test_parameters_with_a_learning_rate_of_their_own():
    model = Line()
    args = TrainingArguments(learning_rate=0.2, weight_decay=0.3)
    optimizer = make_optimizer(model, args, {"matrix.weight": 0.1, "matrix.bias": 0.1})
    groups = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {"matrix.weight": (0.02, 0.3), "matrix.bias": (0.02, 0), "layer_norm.weight": (0.2, 0)}
    for name, (learning_rate, weight_decay) in expected.items():
        assert groups[id(model.get_parameter(name))] == (pytest.approx(learning_rate), weight_decay)


def test_training_follows_plain_pytorch(tmp_path):
    """Two epochs of two steps with warm-up and linear decay, against the same steps written out."""
    run = make_run(
        tmp_path, num_train_epochs=2, learning_rate=0.1, num_warmup_steps=1, weight_decay=0.0, max_grad_norm=0.5
    )
    results = run.train()
    torch.manual_seed(0)
    expected = Line()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1, eps=1e-6, weight_decay=0.0)
    losses = []
    sampler = ShuffledBatchSampler(8, 4)
    points = Points()
    for step in range(4):
        # 1 step of warm-up from 0, then linearly down to 0 after the 4th step.
        optimizer.param_groups[0]["lr"] = 0.1 * [0, 1, 2 / 3, 1 / 3][step]
        sampler.set_position(step // 2)
        inputs = collate([points[i] for i in list(sampler)[step % 2]])["inputs"]
        loss, _ = squared_error(expected, inputs)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    for parameter, value in zip(parameters(run), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, value)
    assert [(result["epoch"], result["step"]) for result in results] == [(1, 2), (2, 4)]
    assert math.isclose(results[1]["train_loss"], (losses[2] + losses[3]) / 2, rel_tol=1e-5)


def test_learning_rate_decays_after_epochs():
    """The authors' release: a rise over a tenth of the steps, then a tenth of the rate after some epochs."""
    args = TrainingArguments(
        learning_rate=1.0, num_warmup_steps=0.1, lr_scheduler_type="constant_with_warmup", lr_decay_epochs=[2, 4]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, args, num_steps=20, steps_per_epoch=4)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.5, *[1] * 6, *[0.1] * 8, *[0.01] * 4])


def test_accumulated_batches_train_like_one_large_batch(tmp_path):
    large, small = (
        make_run(tmp_path / str(size), batch_size=size, num_train_epochs=2, gradient_accumulation_steps=4 // size)
        for size in (4, 2)
    )
    large.train()
    assert small.train()[-1]["step"] == 4
    for parameter, value in zip(parameters(small), parameters(large), strict=True):
        torch.testing.assert_close(parameter, value)


def test_max_train_steps_ends_the_training(tmp_path):
    epochs = []
    run = make_run(
        tmp_path,
        begin_epoch=epochs.append,
        end_epoch=lambda epoch, model, is_last: {"last": is_last},
        num_train_epochs=5,
        max_train_steps=3,
    )
    results = run.train()
    assert epochs == [0, 1]
    assert [(result["step"], result["last"]) for result in results] == [(2, False), (3, True)]
    assert json.loads((tmp_path / "all_results.json").read_text()) == results


def test_max_train_steps_lengthens_the_training(tmp_path):
    epochs = []
    results = make_run(tmp_path, begin_epoch=epochs.append, num_train_epochs=1, max_train_steps=5).train()
    assert epochs == [0, 1, 2] and [result["step"] for result in results] == [2, 4, 5]


def test_results_of_finished_epochs_survive_a_failure(tmp_path):
    def fail_in_the_second(epoch):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path, begin_epoch=fail_in_the_second, num_train_epochs=3).train()
    assert [result["epoch"] for result in json.loads((tmp_path / "all_results.json").read_text())] == [1]


def test_results_that_are_no_numbers_survive_a_stop(tmp_path):
    arguments = {"end_epoch": lambda epoch, model, is_last: {"eval_pearson": math.nan}, "checkpointing_steps": "epoch"}
    make_run(tmp_path, num_train_epochs=1, **arguments).train()
    assert json.loads((tmp_path / "all_results.json").read_text())[0]["eval_pearson"] is None
    results = make_run(tmp_path, num_train_epochs=2, resume_from_checkpoint="latest", **arguments).train()
    assert all(math.isnan(result["eval_pearson"]) for result in results) and len(results) == 2


def test_means_are_of_what_was_counted():
    Accelerator(cpu=True)  # the totals are those of all its processes
    totals = Totals()
    totals.add({"loss": (torch.tensor(1.0), 1), "region_loss": (torch.tensor(0.0), 0), "samples": (4, 0)})
    totals.add({"loss": (torch.tensor(9.0), 3), "region_loss": (torch.tensor(10.0), 2), "samples": (3, 0)})
    collected = totals.flush()
    assert collected == {"loss": (10.0, 4.0), "region_loss": (10.0, 2.0), "samples": (7.0, 0.0)}
    assert totals.flush() == {}
    add_totals(collected, {"loss": (2.0, 2.0), "new": (3.0, 1.0)})
    assert means_of(collected) == {"loss": 2.0, "region_loss": 5.0, "new": 3.0}


def test_weights_are_averaged(tmp_path):
    """Against the averages written out: rate min(0.5, (1 + t) / (10 + t)) after step t, from those of the first."""
    seen = []

    def compute_losses(model, inputs):
        if run.step:
            seen.append(model.matrix.weight.detach().clone())
        return squared_error(model, inputs)

    run = make_run(
        tmp_path,
        num_train_epochs=5,
        learning_rate=0.1,
        ema_decay=0.5,
        end_epoch=lambda epoch, model, is_last: {"eval_weight": model.matrix.weight[0, 0].item()},
    )
    run.compute_losses = compute_losses
    results = run.train()
    seen.append(run.model.matrix.weight.detach())
    assert len(seen) == 10
    expected = seen[0]
    for step, weight in enumerate(seen[1:], start=2):
        rate = min(0.5, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * weight
    assert (1 + 9) / (10 + 9) > 0.5 > (1 + 7) / (10 + 7)  # both sides of the minimum have their turn
    torch.testing.assert_close(run.averaged.module.matrix.weight, expected)
    assert results[-1]["eval_raw_weight"] == pytest.approx(seen[-1][0, 0].item())
    assert results[-1]["eval_weight"] == pytest.approx(expected[0, 0].item())
    run.write_final_model()
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["matrix.weight"], expected)


# ---------------------------------------------------------------- going on


def train_with_kills(output_dir, kills, **arguments):
    """Trains, dies in the middle of each of these steps, and goes on from the newest checkpoint."""
    for kill in [*kills, None]:
        run = make_run(output_dir, resume_from_checkpoint="latest", **arguments)

        def compute_losses(model, inputs, run=run, kill=kill):
            if run.step == kill:
                raise Killed
            return squared_error(model, inputs)

        run.compute_losses = compute_losses
        try:
            results = run.train()
        except Killed:
            continue
        return run, results


@pytest.mark.parametrize("checkpointing_steps", ["1", "2", "3", "5", "epoch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, checkpointing_steps, accumulation):
    arguments = {
        "dropout": 0.5,
        "batch_size": 2,
        "num_train_epochs": 4,
        "learning_rate": 0.1,
        "gradient_accumulation_steps": accumulation,
        "ema_decay": 0.9,
        "logging_steps": 3,
        "end_epoch": lambda epoch, model, is_last: {"eval_weight": model.matrix.weight[0, 0].item()},
    }
    undisturbed = make_run(tmp_path / "undisturbed", **arguments)
    results = undisturbed.train()
    kills = (1, 4, 4, 7) if accumulation == 2 else (1, 6, 11, 15)
    killed, killed_results = train_with_kills(
        tmp_path / "killed", kills, checkpointing_steps=checkpointing_steps, save_total_limit=1, **arguments
    )
    for parameter, value in zip(parameters(killed), parameters(undisturbed), strict=True):
        assert torch.equal(parameter, value)
    for name, value in undisturbed.averaged.state_dict().items():
        assert torch.equal(killed.averaged.state_dict()[name], value), name
    assert len(killed_results) == 4
    for result, expected in zip(killed_results, results, strict=True):
        assert result == pytest.approx(expected, rel=1e-6)
    assert len(CheckpointFolder(tmp_path / "killed").checkpoints()) == 1


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    first = make_run(tmp_path, num_train_epochs=2, checkpointing_steps="1")
    results = first.train()
    again = make_run(tmp_path, num_train_epochs=2, checkpointing_steps="1", resume_from_checkpoint="latest")
    assert again.train() == results
    for parameter, value in zip(parameters(again), parameters(first), strict=True):
        assert torch.equal(parameter, value)


def test_sigterm_writes_a_checkpoint_and_exits(tmp_path, capsys):
    def compute_losses(model, inputs):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return squared_error(model, inputs)

    run = make_run(tmp_path, num_train_epochs=5)
    run.compute_losses = compute_losses
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_info:
        run.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert exit_info.value.code == TERMINATED == 143
    assert [path.name for path in CheckpointFolder(tmp_path).checkpoints()] == ["checkpoint-3"]
    assert "Terminated after step 3 of 10" in capsys.readouterr().out
    resumed = make_run(tmp_path, num_train_epochs=5, resume_from_checkpoint="latest")
    resumed.train()
    undisturbed = make_run(tmp_path / "undisturbed", num_train_epochs=5)
    undisturbed.train()
    for parameter, value in zip(parameters(resumed), parameters(undisturbed), strict=True):
        assert torch.equal(parameter, value)


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda folder: flip_a_bit(folder / "optimizer.bin"), "optimizer.bin is not what was written"),
        (lambda folder: (folder / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "expected a checkpoint with a manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "expected a checkpoint with a manifest.json"),
    ],
)
def test_damaged_checkpoints_are_skipped_with_a_message(tmp_path, caplog, damage, message):
    make_run(tmp_path, num_train_epochs=2, checkpointing_steps="1").train()
    damage(tmp_path / "checkpoint-4")
    assert message in find_damage(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-9.unfinished").mkdir()
    assert CheckpointFolder(tmp_path).newest_valid() == tmp_path / "checkpoint-3"
    assert f"checkpoint-4 is skipped: {message}" in caplog.text
    run = make_run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=message):
        run.train()


def test_without_a_checkpoint_latest_is_the_beginning(tmp_path):
    assert len(make_run(tmp_path, num_train_epochs=2, resume_from_checkpoint="latest").train()) == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path, caplog):
    settings = {"seed": 1, "learning_rate": 0.1, "logging_steps": 5}
    make_run(tmp_path, checkpointing_steps="1", settings=settings).train()
    other = make_run(tmp_path, resume_from_checkpoint="latest", settings=settings | {"seed": 2})
    with pytest.raises(ValueError, match="is of another run: seed was 1, is 2"):
        other.train()
    other = make_run(tmp_path, batch_size=2, resume_from_checkpoint="latest", settings=settings)
    with pytest.raises(ValueError, match="is of another run: batches_per_epoch was 2, is 4"):
        other.train()
    other = make_run(tmp_path, resume_from_checkpoint="latest", settings=settings | {"learning_rate": 0.2})
    with pytest.raises(ValueError, match="is of another run: learning_rate was 0.1, is 0.2"):
        other.train()
    changed = settings | {"num_warmup_steps": 3, "logging_steps": 6}
    make_run(tmp_path, resume_from_checkpoint="latest", settings=changed).train()
    assert "goes on with other settings: num_warmup_steps was None, is 3" in caplog.text
    assert "logging_steps" not in caplog.text
    # A checkpoint has an average or has none.
    for before, now in ((None, 0.9), (0.9, None)):
        folder = tmp_path / str(before)
        make_run(folder, checkpointing_steps="1", ema_decay=before).train()
        other = make_run(folder, resume_from_checkpoint="latest", ema_decay=now)
        with pytest.raises(ValueError, match=f"is of another run: ema_decay was {before}, is {now}"):
            other.train()
    # What a script says to be part of what is learned.
    other = make_run(tmp_path, resume_from_checkpoint="latest", settings=changed, fixed_arguments=["num_warmup_steps"])
    with pytest.raises(ValueError, match="is of another run: num_warmup_steps was None, is 3"):
        other.train()


def measured(model):
    return {"eval_weight": model.matrix.weight[0, 0].item()}


def test_a_checkpoint_has_what_was_measured_of_its_own_weights(tmp_path):
    arguments = {"ema_decay": 0.9, "learning_rate": 0.1, "end_epoch": lambda epoch, model, is_last: measured(model)}
    run = make_run(tmp_path, num_train_epochs=2, checkpointing_steps="epoch", **arguments)
    run.train()
    run.write_final_model()
    for folder in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4", tmp_path):
        results = json.loads((folder / "eval_results.json").read_text())
        weight = load_file(folder / "model.safetensors")["matrix.weight"][0, 0].item()
        assert results["eval_weight"] == pytest.approx(weight)
        assert ("eval_raw_weight" in results) == (folder == tmp_path)


def test_results_of_former_weights_are_removed(tmp_path):
    files = ["eval_results.json", "eval_predictions.jsonl", "test_predictions.csv", "retrieval_scores.npy", "RTE.tsv"]

    def run_and_list(**arguments):
        run = make_run(tmp_path, end_epoch=None, checkpointing_steps="epoch", **arguments)
        for name in [*files, "notes.txt"]:
            (tmp_path / name).write_text("of the former weights")
        run.train()
        return {path.name for path in tmp_path.iterdir() if path.is_file()} - {"recipe.yaml", "all_results.json"}

    assert run_and_list(num_train_epochs=1) == {"notes.txt"}
    assert run_and_list(num_train_epochs=2, resume_from_checkpoint="latest") == {"notes.txt"}
    # Nothing is trained any more: they are of these weights.
    assert run_and_list(num_train_epochs=2, resume_from_checkpoint="latest") == {*files, "notes.txt"}


def test_an_evaluation_that_is_killed_costs_no_training(tmp_path):
    evaluated = []

    def end_epoch(epoch, model, is_last):
        evaluated.append(epoch)
        if len(evaluated) == 2:
            raise Killed
        return measured(model)

    arguments = {"num_train_epochs": 3, "checkpointing_steps": "epoch", "learning_rate": 0.1}
    with pytest.raises(Killed):
        make_run(tmp_path / "killed", end_epoch=end_epoch, **arguments).train()
    trained = []

    def compute_losses(model, inputs):
        trained.append(inputs)
        return squared_error(model, inputs)

    resumed = make_run(
        tmp_path / "killed",
        end_epoch=end_epoch,
        compute_losses=compute_losses,
        resume_from_checkpoint="latest",
        **arguments,
    )
    results = resumed.train()
    assert evaluated == [0, 1, 1, 2] and len(trained) == 2
    undisturbed = make_run(
        tmp_path / "undisturbed", end_epoch=lambda epoch, model, is_last: measured(model), **arguments
    )
    assert results == [pytest.approx(result) for result in undisturbed.train()]
    for parameter, value in zip(parameters(resumed), parameters(undisturbed), strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("num_evaluations", [1, 2, 3, 4])
def test_sigterm_in_an_evaluation_ends_the_run_behind_it(tmp_path, num_evaluations):
    """Of the weights, and of their averages. What was measured of the training before it is not lost."""
    evaluated = []

    def end_epoch(epoch, model, is_last):
        evaluated.append(epoch)
        if len(evaluated) == num_evaluations:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(model)

    def train(folder, **more):
        return make_run(tmp_path / folder, num_train_epochs=2, ema_decay=0.9, end_epoch=end_epoch, **more).train()

    with pytest.raises(SystemExit) as exit_info:
        train("terminated")
    assert exit_info.value.code == TERMINATED and len(evaluated) == num_evaluations
    checkpoint = CheckpointFolder(tmp_path / "terminated").newest_valid()
    assert checkpoint.name == ("checkpoint-2" if num_evaluations < 3 else "checkpoint-4")
    results = train("terminated", resume_from_checkpoint="latest")
    # An evaluation is repeated where the other one of its epoch was still to come.
    assert len(evaluated) == 4 + num_evaluations % 2
    assert results == [pytest.approx(result) for result in train("undisturbed")]


def test_the_newest_checkpoints_are_kept(tmp_path):
    make_run(tmp_path, num_train_epochs=6, checkpointing_steps="1", save_total_limit=2).train()
    assert [path.name for path in CheckpointFolder(tmp_path).checkpoints()] == ["checkpoint-12", "checkpoint-11"]


def test_checkpoints_are_complete_or_absent(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    accelerator = Accelerator(cpu=True)
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(accelerator, 2, lambda folder: (folder / "whole").touch())
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(accelerator, 4, fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4.unfinished"]
    assert checkpoints.newest_valid() == tmp_path / "checkpoint-2"
    # The next checkpoint of that name takes the place of what was left behind.
    checkpoints.save(accelerator, 4, lambda folder: (folder / "new").touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert sorted(path.name for path in (tmp_path / "checkpoint-4").iterdir()) == ["manifest.json", "new"]


def test_a_run_is_not_mixed_with_the_checkpoints_of_another(tmp_path):
    make_run(tmp_path, num_train_epochs=6, checkpointing_steps="5").train()
    args = OutputArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="holds checkpoints of a run: go on with `--resume_from_checkpoint latest`"):
        args.check_output_dir()
    # Begun anew, it keeps its own checkpoints, although those that were there have larger numbers.
    make_run(tmp_path, num_train_epochs=2, checkpointing_steps="2", save_total_limit=2).train()
    names = ["checkpoint-4", "checkpoint-2"]
    assert [path.name for path in CheckpointFolder(tmp_path).checkpoints()] == names
    # Gone on with at an earlier one, it leaves the later ones behind.
    first = str(tmp_path / "checkpoint-2")
    make_run(tmp_path, num_train_epochs=2, resume_from_checkpoint=first, checkpointing_steps="3").train()
    names = ["checkpoint-3", "checkpoint-2"]
    assert [path.name for path in CheckpointFolder(tmp_path).checkpoints()] == names
    # However the path is written,
    first = str(tmp_path / "checkpoint-2" / ".." / "checkpoint-2")
    OutputArguments(output_dir=str(tmp_path), resume_from_checkpoint=first).check_output_dir()
    make_run(tmp_path, num_train_epochs=2, resume_from_checkpoint=first).train()
    assert [path.name for path in CheckpointFolder(tmp_path).checkpoints()] == ["checkpoint-2"]
    # and a run that begins with the checkpoint of another has none of a third.
    make_run(tmp_path / "third", num_train_epochs=1, checkpointing_steps="1").train()
    args = OutputArguments(output_dir=str(tmp_path / "third"), resume_from_checkpoint=first)
    with pytest.raises(ValueError, match="holds checkpoints of a run"):
        args.check_output_dir()
    make_run(tmp_path / "third", num_train_epochs=2, resume_from_checkpoint=first, checkpointing_steps="4").train()
    assert [path.name for path in CheckpointFolder(tmp_path / "third").checkpoints()] == ["checkpoint-4"]


def test_a_checkpoint_that_takes_the_place_of_another_is_never_missing(tmp_path, monkeypatch):
    accelerator, checkpoints = Accelerator(cpu=True), CheckpointFolder(tmp_path)
    checkpoints.save(accelerator, 4, lambda folder: (folder / "first").touch())
    rename, renamed = Path.rename, []

    def die(path, target):
        renamed.append(path)
        if len(renamed) >= 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(accelerator, 4, lambda folder: (folder / "second").touch())
    monkeypatch.undo()
    assert (checkpoints.newest_valid() / "second").exists()
    # Nor is it where the next one is killed while it is written.
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(accelerator, 4, lambda folder: die(folder, folder))
    assert (checkpoints.newest_valid() / "first").exists()
    checkpoints.save(accelerator, 4, lambda folder: (folder / "third").touch())
    assert (checkpoints.newest_valid() / "third").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_sigterm_before_an_evaluation_saves_what_was_trained(tmp_path):
    def compute_losses(model, inputs):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # in the last step of the first epoch
        return squared_error(model, inputs)

    run = make_run(tmp_path, num_train_epochs=3)
    run.compute_losses = compute_losses
    with pytest.raises(SystemExit):
        run.train()
    assert [path.name for path in CheckpointFolder(tmp_path).checkpoints()] == ["checkpoint-2"]
    results = make_run(tmp_path, num_train_epochs=3, resume_from_checkpoint="latest").train()
    assert [(result["epoch"], result["step"]) for result in results] == [(1, 2), (2, 4), (3, 6)]


def test_a_run_that_was_ended_early_goes_on_in_the_middle_of_its_epoch(tmp_path):
    make_run(tmp_path / "a", num_train_epochs=3, max_train_steps=3, checkpointing_steps="epoch").train()
    arguments = {"num_train_epochs": 3, "resume_from_checkpoint": "latest"}
    results = make_run(tmp_path / "a", **arguments).train()
    assert [(result["epoch"], result["step"]) for result in results] == [(1, 2), (2, 3), (2, 4), (3, 6)]
    behind = make_run(tmp_path / "a", num_train_epochs=1, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="is of step 3, behind the last step of this run, 2"):
        behind.train()


def test_a_failed_upload_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("training.create_repository", lambda args: "org/model")
    uploads = []

    def upload(folder, repo_id, step, token):
        uploads.append(step)
        future = Future()
        future.set_exception(OSError("504"))
        return future

    monkeypatch.setattr("training.upload_checkpoint", upload)
    run = make_run(tmp_path, num_train_epochs=2, checkpointing_steps="1")
    run.output_args.push_checkpoints = True
    assert len(run.train()) == 2
    assert uploads == [1, 2, 3, 4] and "checkpoint-4 could not be uploaded: 504" in caplog.text


def test_arguments_have_the_last_word_over_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    results = make_run(tmp_path, num_train_epochs=2, batch_size=2, gradient_accumulation_steps=2).train()
    assert [result["step"] for result in results] == [2, 4]


@pytest.mark.parametrize("logging_steps", [1, 3, 100])
@pytest.mark.parametrize("checkpointing_steps", ["2", None])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, logging_steps, checkpointing_steps):
    run = make_run(
        tmp_path,
        points=Points(nan_at=5),
        batch_size=1,
        num_train_epochs=2,
        logging_steps=logging_steps,
        checkpointing_steps=checkpointing_steps,
    )
    sampler = ShuffledBatchSampler(8, 1)
    step = list(sampler).index([5]) + 1
    with pytest.raises(FloatingPointError, match=rf"The loss is nan at step {step} \(epoch 1, process 0\): error nan"):
        run.train()
    report = json.loads((tmp_path / "non_finite_loss_0.json").read_text())
    assert report == {"step": step, "epoch": 1, "process": 0, "loss": "nan", "means": {"error": "nan"}, "samples": [5]}
    if checkpointing_steps is None:
        return
    # No checkpoint holds what came of it.
    newest = CheckpointFolder(tmp_path).newest_valid()
    assert int(newest.name.removeprefix("checkpoint-")) < step
    assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"per_device_train_batch_size": 0}, "`--per_device_train_batch_size` must be at least 1, got 0"),
        ({"num_train_epochs": -1}, "`--num_train_epochs` must be at least 1, got -1"),
        ({"max_train_steps": 0}, "`--max_train_steps` must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "`--max_grad_norm` must be positive, got 0.0"),
        ({"num_warmup_steps": -1}, "`--num_warmup_steps` must not be negative, got -1"),
        ({"lr_decay_epochs": [2]}, "goes with `--lr_scheduler_type constant_with_warmup`, got linear"),
        ({"lr_scheduler_type": "constant", "num_warmup_steps": 5}, "another `--lr_scheduler_type` than constant"),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "cosine_warmup_with_min_lr needs arguments that there"),
        ({"ema_decay": 1.0}, "`--ema_decay` must be at least 0 and below 1, got 1.0"),
        ({"gradient_accumulation_steps": 0}, "`--gradient_accumulation_steps` must be at least 1, got 0"),
    ],
)
def test_bad_training_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**arguments)


def test_no_average_in_the_place_of_a_recipe_s(tmp_path):
    assert make_run(tmp_path, ema_decay=0.0).averaged is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checkpointing_steps": "often"}, "must be a positive number or 'epoch', got 'often'"),
        ({"save_total_limit": 0}, "`--save_total_limit` must be at least 1, got 0"),
        ({"logging_steps": 0}, "`--logging_steps` must be at least 1, got 0"),
        ({"push_checkpoints": True}, "goes with `--push_to_hub` and `--checkpointing_steps`"),
    ],
)
def test_bad_output_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        OutputArguments(output_dir=str(tmp_path), **arguments)


def test_a_trained_model_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="already holds a model"):
        OutputArguments(output_dir=str(tmp_path)).check_output_dir()
    OutputArguments(output_dir=str(tmp_path), overwrite_output_dir=True).check_output_dir()
    # Without a checkpoint to go on from, it would be trained anew.
    with pytest.raises(ValueError, match="already holds a model"):
        OutputArguments(output_dir=str(tmp_path), resume_from_checkpoint="latest").check_output_dir()
    (tmp_path / "checkpoint-2").mkdir()
    OutputArguments(output_dir=str(tmp_path), resume_from_checkpoint="latest").check_output_dir()


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
