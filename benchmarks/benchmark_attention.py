"""
Measures the attention implementations of transformers in InterBERT: the encoder alone, inference and training.

```bash
python benchmarks/benchmark_attention.py
python benchmarks/benchmark_attention.py --device cuda --dtype bfloat16 --batch_size 64
```

The model has the size of the authors' release. Lengths are tokens x regions of the longest text and image; the others
of a batch are drawn from half of that to all of it, and padded, so that there is a mask to apply. Training is forward
and backward pass without an optimizer, whose work is the same for all; attention dropout is 0, since flex_attention
has none. Where an implementation cannot run, the table has the reason below it. On a CPU, flex_attention is compiled
for about a minute first, for each length.
"""

import argparse
from collections.abc import Callable

import torch
from drawn_inputs import build_config
from measuring import DTYPES, add_measuring_arguments, describe_machine, measure, milliseconds, print_table, speed_ratio

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTModel

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the attention implementations.")
    add_measuring_arguments(parser, rounds=4)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--lengths", nargs="+", default=["16x36", "36x36", "128x100"], help="Tokens x regions of the longest pair."
    )
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), help="The first is what ratios refer to."
    )
    return parser.parse_args(arguments)


def draw_inputs(
    config: InterBERTConfig, batch_size: int, num_tokens: int, num_regions: int, device: torch.device
) -> dict[str, torch.Tensor]:
    def draw_mask(length):
        lengths = torch.randint((length + 1) // 2, length + 1, (batch_size,))
        lengths[0] = length
        return (torch.arange(length) < lengths[:, None]).long()

    inputs = {
        "input_ids": torch.randint(config.vocab_size, (batch_size, num_tokens)),
        "attention_mask": draw_mask(num_tokens),
        "region_features": torch.rand(batch_size, num_regions, config.region_feature_size),
        "region_boxes": torch.rand(batch_size, num_regions, 2, 2).sort(dim=2).values.flatten(2),
        "region_attention_mask": draw_mask(num_regions),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def make_variant(
    model: InterBERTModel, inputs: dict[str, torch.Tensor], implementation: str, trains: bool
) -> Callable[[], None]:
    def infer():
        model.set_attn_implementation(implementation)
        model.eval()
        with torch.inference_mode():
            model(**inputs)

    def train():
        model.set_attn_implementation(implementation)
        model.train()
        outputs = model(**inputs)
        (outputs.text_pooler_output.sum() + outputs.vision_pooler_output.sum()).backward()
        model.zero_grad()

    return train if trains else infer


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    config = build_config(args.config_overrides, attention_probs_dropout_prob=0, vision_attention_probs_dropout_prob=0)
    model = InterBERTModel(config).to(device, dtype)
    print(f"Attention implementations in an encoder of {model.num_parameters():,} parameters, batch {args.batch_size}")
    print(describe_machine(device, args.dtype))

    rows, reasons = [], {}
    for length in args.lengths:
        num_tokens, num_regions = map(int, length.split("x"))
        inputs = draw_inputs(config, args.batch_size, num_tokens, num_regions, device)
        length_rows = {name: {"attention": name, "tokens x regions": length} for name in args.implementations}
        for trains, title in ((False, "inference"), (True, "training")):
            variants = {}
            for name in args.implementations:
                run = make_variant(model, inputs, name, trains)
                try:
                    run()
                    variants[name] = run
                except Exception as error:  # which one differs from implementation to implementation
                    reasons[f"{name}, {title}"] = first_line(error)
                    model.zero_grad()
            seconds = measure(variants, args.rounds, device, args.seed)
            baseline = next(iter(seconds.values()), None)
            for name, row in length_rows.items():
                row[f"{title}: ms"] = milliseconds(seconds[name]) if name in seconds else "–"
                row[f"{title}: speed"] = speed_ratio(baseline, seconds[name]) if name in seconds else "–"
        rows += length_rows.values()
    print_table(rows)
    for name, reason in reasons.items():
        print(f"skipped: {name}: {reason}")


if __name__ == "__main__":
    main()
