"""
Measures which share of the machine's matrix-multiplication peak the model reaches: match scores and pretraining steps,
padded and trimmed.

```bash
python benchmarks/benchmark_matmul_peak.py
python benchmarks/benchmark_matmul_peak.py --dataset_name FOLDER --tokenizer_name FOLDER
```

The peak is the highest speed of the multiplications listed first: square ones, and those of a layer of the model for a
padded batch. All are measured in turns with the model. The model has the size of the authors' release, its batches are
those of examples/run_pretrain.py, grouped by length; "padded" has the same pairs with 36 tokens and 36 regions each,
and what it computes on padding counts as reached. Match scores compute the encoder, its last layers at position 0
alone, and the match head. Pretraining is measured as forward and backward pass, and as the whole step with gradient
clipping and AdamW, which read and write all parameters but multiply no matrices.

On a CPU, keep the C library from returning the memory of each step to the system:

```bash
GOMP_SPINCOUNT=10000 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \\
    python benchmarks/benchmark_matmul_peak.py
```
"""

import argparse
import dataclasses
import functools
import statistics

import torch
from benchmark_pretraining_step import Path, PretrainingStep, autocast, model_inputs
from drawn_inputs import MAX_REGIONS, MAX_TOKENS, PretrainingBatches, add_dataset_arguments, pad_batch
from measuring import (
    DTYPES,
    add_measuring_arguments,
    count_flops,
    describe_machine,
    measure,
    milliseconds,
    per_second,
    print_table,
)

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForPreTraining


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the share of the matrix-multiplication peak that is reached.")
    add_dataset_arguments(parser)
    add_measuring_arguments(parser, rounds=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: by autocast.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_batches", type=int, default=3, help="Batches of different lengths in a round.")
    parser.add_argument("--square_sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="Of the peak.")
    return parser.parse_args(arguments)


def multiplications(config: InterBERTConfig, args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """`(rows, inner, columns)` of the products that the peak is the fastest of."""
    positions = args.batch_size * (MAX_TOKENS + MAX_REGIONS + 1)
    widths = ((config.hidden_size, config.hidden_size), (config.hidden_size, config.intermediate_size))
    squares = [(size, size, size) for size in args.square_sizes]
    return squares + [(positions, *width) for width in (*widths, widths[1][::-1])]


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    source = PretrainingBatches(args)
    model = InterBERTForPreTraining(source.config).to(device)
    step = PretrainingStep(model)
    grouped = [
        {name: tensor.to(device) for name, tensor in batch.items()} for batch in source.grouped(args.num_batches)
    ]
    fused = Path("SDPA attention", "sdpa", uses_bf16=dtype == torch.bfloat16)
    eager = dataclasses.replace(fused, attn_implementation="eager")  # whose products are all counted
    print(f"{model.num_parameters():,} parameters, batches of {args.batch_size} pairs")
    print(describe_machine(device, args.dtype))
    print(f"Lengths: {source.source}")

    @torch.inference_mode()
    def score(batches, path):
        model.eval()
        model.set_attn_implementation(path.attn_implementation)
        for batch in batches:
            with autocast(batch, path):
                outputs = model.interbert(**model_inputs(batch), pooled_only=True)
                model.itm_head(outputs.text_pooler_output, outputs.vision_pooler_output)

    def compute_gradients(batches, path):
        model.train()
        for batch in batches:
            step.compute_gradients(batch, path)
            step.optimizer.zero_grad()

    def train(batches, path):
        model.train()
        step.run(batches, path)

    variants, flops, num_pairs = {}, {}, {}
    for num_rows, inner, columns in multiplications(source.config, args):
        left = torch.randn(num_rows, inner, device=device, dtype=dtype)
        right = torch.randn(columns, inner, device=device, dtype=dtype)
        name = f"{num_rows} x {inner} times {inner} x {columns}"
        variants[name] = functools.partial(torch.nn.functional.linear, left, right)
        flops[name] = 2 * num_rows * inner * columns
    products = list(variants)
    # One padded batch is as long as any other.
    for batches, kind in (([pad_batch(grouped[0])], "padded"), (grouped, "trimmed")):
        for run, title in ((score, "match scores"), (compute_gradients, "forward and backward"), (train, "whole step")):
            name = f"{title}, {kind}"
            variants[name] = functools.partial(run, batches, fused)
            num_pairs[name] = args.batch_size * len(batches)
            if run is train:  # clipping and AdamW multiply no matrices
                flops[name] = flops[f"forward and backward, {kind}"]
            else:
                flops[name] = count_flops(functools.partial(run, batches, eager))

    seconds = measure(variants, args.rounds, device, args.seed)
    speeds = {name: flops[name] / statistics.median(values) for name, values in seconds.items()}
    peak = max(speeds[name] for name in products)
    print_table(
        [
            {
                "": name,
                "GFLOP": f"{flops[name] / 1e9:,.1f}",
                "ms": milliseconds(values),
                "GFLOP/s": f"{speeds[name] / 1e9:,.1f}",
                "share of the peak": f"{100 * speeds[name] / peak:.0f} %",
                "pairs/s": "" if name in products else per_second(num_pairs[name], values),
            }
            for name, values in seconds.items()
        ]
    )


if __name__ == "__main__":
    main()
