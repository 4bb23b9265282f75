"""
Measures a pretraining step: what is saved by fused attention, by heads at the scored positions only, by trimming
batches to their longest text and image (padded versus trimmed batches), and by grouping pairs by length.

```bash
python benchmarks/benchmark_pretraining_step.py
python benchmarks/benchmark_pretraining_step.py --dataset_name FOLDER --tokenizer_name FOLDER
```

A step is forward pass, backward pass, gradient clipping and AdamW, of the batches that examples/run_pretrain.py makes
(MLM, MOM, ITM) with the model of the authors' release. The plain path uses eager attention, pads everything to 36
tokens and 36 regions, and runs every head at every position. Every row adds one thing to the row above; "grouped by
length" is what examples/run_pretrain.py does with `--group_by_length`, and bf16 what it does with `--mixed_precision
bf16` as well. Before anything is timed, the losses of all float32 paths are compared.

On a CPU, keep the C library from returning the memory of each step to the system, which costs the padded paths most:

```bash
GOMP_SPINCOUNT=10000 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \\
    python benchmarks/benchmark_pretraining_step.py
```
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from drawn_inputs import PretrainingBatches, add_dataset_arguments, pad_batch
from measuring import (
    add_measuring_arguments,
    describe_machine,
    has_bf16_instructions,
    measure,
    milliseconds,
    per_second,
    print_table,
    speed_ratio,
)
from torch import nn

from modeling_interbert import InterBERTForPreTraining
from training import TrainingArguments, make_optimizer

LABELS = ("labels", "region_targets", "region_target_mask", "itm_labels")
LOSS_TOLERANCE = 1e-3  # of losses of order 10, in float32


@dataclass(frozen=True)
class Path:
    """One way to compute a step."""

    name: str
    attn_implementation: str = "sdpa"
    pads_to_maximum: bool = False
    runs_heads_everywhere: bool = False
    groups_by_length: bool = False
    uses_bf16: bool = False


PATHS = (
    Path("plain: eager, padded to 36 + 36, heads everywhere", "eager", True, True),
    Path("+ SDPA attention", pads_to_maximum=True, runs_heads_everywhere=True),
    Path("+ heads at scored positions only", pads_to_maximum=True),
    Path("+ trimmed to the longest of the batch"),
    Path("+ grouped by length", groups_by_length=True),
    Path("+ bf16 autocast", groups_by_length=True, uses_bf16=True),
)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a pretraining step, and what makes it fast.")
    add_dataset_arguments(parser)
    add_measuring_arguments(parser, rounds=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--num_batches", type=int, default=5, help="Batches in a round of the paths whose batches differ in length."
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Measures bf16 too. By default where the device has instructions for it; elsewhere it is very slow.",
    )
    return parser.parse_args(arguments)


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch without its labels."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def autocast(batch: dict[str, torch.Tensor], path: Path) -> torch.autocast:
    return torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=path.uses_bf16)


def loss_with_heads_everywhere(model: InterBERTForPreTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's loss, with all heads at all positions, padding included, and the unscored ones left out after."""
    labels, region_targets, region_target_mask, itm_labels = (batch[name] for name in LABELS)
    outputs = model(**model_inputs(batch))
    mlm_loss = nn.functional.cross_entropy(outputs.mlm_logits.float().transpose(1, 2), labels, reduction="sum")
    region_loss = nn.functional.cross_entropy(
        outputs.region_logits.float().transpose(1, 2),
        region_targets.masked_fill(region_target_mask == 0, -100),
        reduction="sum",
    )
    return (
        mlm_loss / (labels != -100).sum().clamp(min=1)
        + region_loss / region_target_mask.sum().clamp(min=1)
        + nn.functional.cross_entropy(outputs.itm_logits.float(), itm_labels)
    )


def compute_loss(model: InterBERTForPreTraining, batch: dict[str, torch.Tensor], path: Path) -> torch.Tensor:
    model.set_attn_implementation(path.attn_implementation)
    with autocast(batch, path):
        return loss_with_heads_everywhere(model, batch) if path.runs_heads_everywhere else model(**batch).loss


class PretrainingStep:
    """The step of examples/training.py, without Accelerate."""

    def __init__(self, model: InterBERTForPreTraining):
        self.model = model.train()
        self.training_args = TrainingArguments()
        self.optimizer = make_optimizer(model, self.training_args)

    def compute_gradients(self, batch: dict[str, torch.Tensor], path: Path) -> None:
        compute_loss(self.model, batch, path).backward()

    def update_weights(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training_args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, batches: list[dict[str, torch.Tensor]], path: Path) -> None:
        for batch in batches:
            self.compute_gradients(batch, path)
            self.update_weights()


@torch.inference_mode()
def check_losses(model: InterBERTForPreTraining, batch: dict[str, torch.Tensor], paths: Sequence[Path]) -> float:
    """
    Compares the float32 losses of the paths on one batch.

    Returns:
        The largest difference from the first path.

    Raises:
        SystemExit: if it exceeds the tolerance.
    """
    model.eval()
    losses = {
        path.name: compute_loss(model, pad_batch(batch) if path.pads_to_maximum else batch, path).item()
        for path in paths
        if not path.uses_bf16
    }
    plain_loss = losses[paths[0].name]
    largest = max(abs(loss - plain_loss) for loss in losses.values())
    if not largest <= LOSS_TOLERANCE:
        raise SystemExit(f"The paths have different losses, expected within {LOSS_TOLERANCE}: {losses}.")
    return largest


def padding_share(batches: list[dict[str, torch.Tensor]]) -> float:
    masks = [batch[name] for batch in batches for name in ("attention_mask", "region_attention_mask")]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    source = PretrainingBatches(args)
    model = InterBERTForPreTraining(source.config).to(device)
    print(f"A pretraining step of {model.num_parameters():,} parameters, batches of {args.batch_size} pairs")
    print(describe_machine(device, "float32"))
    print(f"Lengths: {source.source}")
    paths = PATHS
    if args.bf16 is False or (args.bf16 is None and not has_bf16_instructions(device)):
        paths = PATHS[:-1]
        print("bf16 skipped: " + ("--no-bf16" if args.bf16 is False else "this CPU has no bf16 instructions"))

    def to_device(batches):
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    shuffled, grouped = to_device(source.shuffled(args.num_batches)), to_device(source.grouped(args.num_batches))
    print(f"Losses of the float32 paths differ by {check_losses(model, shuffled[0], paths):.1e} at most")
    step = PretrainingStep(model)
    batches, variants = {}, {}
    for path in paths:
        if path.pads_to_maximum:  # one batch is as long as any other
            batches[path.name] = [pad_batch(shuffled[0])]
        else:
            batches[path.name] = grouped if path.groups_by_length else shuffled
        variants[path.name] = lambda path=path: step.run(batches[path.name], path)
    seconds = measure(variants, args.rounds, device, args.seed)
    per_step = {name: [value / len(batches[name]) for value in values] for name, values in seconds.items()}
    plain = per_step[paths[0].name]
    print_table(
        [
            {
                "step": name,
                "padding": f"{100 * padding_share(batches[name]):.0f} %",
                "ms": milliseconds(values),
                "pairs/s": per_second(args.batch_size, values),
                f"speed (median, range of {args.rounds})": speed_ratio(plain, values),
            }
            for name, values in per_step.items()
        ]
    )


if __name__ == "__main__":
    main()
