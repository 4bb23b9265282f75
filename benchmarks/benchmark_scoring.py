"""
Measures match scores of captions with images: every caption against every image, and one pair alone (batch 1).

```bash
python benchmarks/benchmark_scoring.py
python benchmarks/benchmark_scoring.py --dataset_name FOLDER --tokenizer_name FOLDER
```

The model has the size of the authors' release, the images have 36 regions, the captions at most 16 tokens: drawn ones
or, with `--dataset_name`, those of a region dataset. The plain path is the pretraining model in float32 with eager
attention, everything padded to 36 tokens, every head at every position. Every row adds one thing to the row above; the
last float32 row is `score_captions_against_images` of examples/retrieval_evaluation.py, as the scripts call it. Weights
are random, with the match head scaled such that the log-odds of a caption's images have a standard deviation of 1.

The scores of every path are compared with the plain path's; the script fails if, in float32, any two images whose
scores for a caption are 0.001 or more apart change places.

On a CPU, keep the C library from returning memory to the system after each batch, which costs the plain path most:

```bash
GOMP_SPINCOUNT=10000 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \\
    python benchmarks/benchmark_scoring.py
```
"""

import argparse
import contextlib
import copy
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from drawn_inputs import (
    MAX_REGIONS,
    MAX_TOKENS,
    add_dataset_arguments,
    build_config,
    build_tokenizer,
    draw_captions,
    draw_record,
)
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
from transformers import AutoTokenizer, BertTokenizer

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForPreTraining
from processing import InterBERTProcessor, load_region_dataset
from retrieval_evaluation import score_captions_against_images

# Scores are sums of thousands of float32 products, whose order differs between the paths: closer ones are a tie.
TIE_MARGIN = 1e-3


@dataclass(frozen=True)
class Path:
    """One way to score pairs that is written out here."""

    name: str
    attn_implementation: str = "sdpa"
    trims: bool = True
    runs_all_heads: bool = False
    pooled_only: bool = False


PATHS = (
    Path("plain: eager, padded to 36 tokens, all heads", "eager", trims=False, runs_all_heads=True),
    Path("+ SDPA attention", trims=False, runs_all_heads=True),
    Path("+ trimmed to the longest of the batch", runs_all_heads=True),
    Path("+ match head alone"),
    Path("+ last layers at position 0 alone", pooled_only=True),
)
SHIPPED = "+ images embedded once (as shipped)"
SHIPPED_BF16 = "+ bf16"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure match scores, and what makes them fast.")
    add_dataset_arguments(parser)
    add_measuring_arguments(parser, rounds=3)
    parser.add_argument("--num_captions", type=int, default=8)
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=16, help="Longer captions, in tokens, are left out.")
    parser.add_argument("--batch_size", type=int, default=32, help="Pairs that are scored at a time.")
    parser.add_argument("--latency_rounds", type=int, default=20, help="Rounds of the measurement at batch 1.")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Measures bf16 too. By default where the device has instructions for it; elsewhere it is very slow.",
    )
    return parser.parse_args(arguments)


def load_captions(
    args: argparse.Namespace, rng: np.random.Generator
) -> tuple[list[str], BertTokenizer, InterBERTConfig]:
    """The captions with their tokenizer, and the configuration of a model with its vocabulary."""
    if (args.dataset_name is None) != (args.tokenizer_name is None):
        raise ValueError("`--dataset_name` and `--tokenizer_name` need each other, but one of them is missing.")
    if args.dataset_name is None:
        config = build_config(args.config_overrides)
        tokenizer = build_tokenizer(config.vocab_size)
        return draw_captions(rng, tokenizer, args.num_captions, args.max_length), tokenizer, config
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    regions = load_region_dataset(args.dataset_name, args.split, cache_dir=args.cache_dir)
    captions = []
    for image in rng.permutation(len(regions)).tolist():
        captions += [c for c in regions.captions(image)[:1] if len(tokenizer(c).input_ids) <= args.max_length]
        if len(captions) == args.num_captions:
            break
    return captions, tokenizer, build_config(args.config_overrides, vocab_size=len(tokenizer))


@torch.inference_mode()
def score_by_path(
    model: InterBERTForPreTraining,
    processor: InterBERTProcessor,
    captions: list[str],
    records: list[dict],
    batch_size: int,
    path: Path,
) -> np.ndarray:
    """Log-odds of a match, float32 of shape `(captions, images)`, in the batches of the shipped function."""
    model.set_attn_implementation(path.attn_implementation)
    order = np.arange(len(captions))
    if path.trims:
        order = np.argsort([len(ids) for ids in processor.tokenizer(captions).input_ids], kind="stable")
    images_per_block = min(16, batch_size)
    captions_per_block = max(1, batch_size // images_per_block)
    scores = np.zeros((len(captions), len(records)), dtype=np.float32)
    for first_image in range(0, len(records), images_per_block):
        images = slice(first_image, first_image + images_per_block)
        regions = processor(regions=records[images], return_tensors="pt").to(model.device)
        num_images = len(regions["region_features"])
        for first_caption in range(0, len(captions), captions_per_block):
            chosen = order[first_caption : first_caption + captions_per_block]
            texts = processor(
                text=[captions[i] for i in chosen],
                padding=True if path.trims else "max_length",
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(model.device)
            pairs = {name: tensor.repeat_interleave(num_images, dim=0) for name, tensor in texts.items()}
            pairs |= {name: tensor.repeat(len(chosen), *[1] * (tensor.dim() - 1)) for name, tensor in regions.items()}
            if path.runs_all_heads:
                logits = model(**pairs).itm_logits
            else:
                outputs = model.interbert(**pairs, pooled_only=path.pooled_only)
                logits = model.itm_head(outputs.text_pooler_output, outputs.vision_pooler_output)
            log_odds = (logits[:, 0] - logits[:, 1]).view(len(chosen), num_images)
            scores[chosen, images] = log_odds.cpu().numpy()
    return scores


def compare_rankings(reference: np.ndarray, scores: np.ndarray) -> tuple[int, int]:
    """
    Counts, for all captions together, the pairs of images that the reference tells apart, by more than float32 errors.

    Args:
        reference, scores: `(captions, images)`.

    Returns:
        How many of them `scores` brings into the other order (or makes equal), and how many there are.
    """
    gaps = reference[:, :, None] - reference[:, None, :]  # (captions, images, images)
    is_higher = gaps > TIE_MARGIN
    is_kept = scores[:, :, None] > scores[:, None, :]
    return int((is_higher & ~is_kept).sum()), int(is_higher.sum())


def make_scorers(
    model: InterBERTForPreTraining, processor: InterBERTProcessor, batch_size: int, has_bf16: bool
) -> dict[str, Callable[[list[str], list[dict]], np.ndarray]]:
    """Every path by its name: from captions and images to log-odds, in the order of the table."""
    accelerator = Accelerator(cpu=model.device.type == "cpu")

    def score_as_shipped(model, captions, records):
        model.set_attn_implementation("sdpa")
        with contextlib.redirect_stderr(io.StringIO()):  # without its progress bar
            return score_captions_against_images(
                accelerator, model, processor, captions, records, batch_size, max_length=MAX_TOKENS
            )

    scorers = {
        path.name: functools.partial(score_by_path, model, processor, batch_size=batch_size, path=path)
        for path in PATHS
    }
    scorers[SHIPPED] = functools.partial(score_as_shipped, model)
    if has_bf16:
        bf16_model = copy.deepcopy(model)
        bf16_model.interbert.to(torch.bfloat16)  # the shipped function computes the head in the head's own precision
        scorers[SHIPPED_BF16] = functools.partial(score_as_shipped, bf16_model)
    return scorers


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    captions, tokenizer, config = load_captions(args, rng)
    records = [draw_record(rng, MAX_REGIONS, config.region_feature_size) for _ in range(args.num_images)]
    processor = InterBERTProcessor(tokenizer, region_feature_size=config.region_feature_size)
    model = InterBERTForPreTraining(config).to(device).eval()
    has_bf16 = has_bf16_instructions(device) if args.bf16 is None else args.bf16
    scorers = make_scorers(model, processor, args.batch_size, has_bf16=False)
    model.itm_head.classifier.weight.data /= scorers[SHIPPED](captions[:2], records).std(axis=1).mean().item()
    scorers = make_scorers(model, processor, args.batch_size, has_bf16)

    token_counts = [len(ids) for ids in tokenizer(captions).input_ids]
    print(f"Match scores of {len(captions)} captions with {len(records)} images, {args.batch_size} pairs at a time")
    print(describe_machine(device, "float32"))
    print(f"Tokens of the captions: {min(token_counts)} to {max(token_counts)}, mean {np.mean(token_counts):.1f}")
    if not has_bf16:
        print("bf16 skipped: " + ("--no-bf16" if args.bf16 is False else "this CPU has no bf16 instructions"))

    scores = {}

    def score_all(name):
        scores[name] = scorers[name](captions, records)

    median_caption = captions[int(np.argsort(token_counts)[len(captions) // 2])]
    one_pair = ([median_caption], records[:1])
    seconds = measure({name: functools.partial(score_all, name) for name in scorers}, args.rounds, device, args.seed)
    latencies = measure(
        {name: functools.partial(scorer, *one_pair) for name, scorer in scorers.items()},
        args.latency_rounds,
        device,
        args.seed,
    )

    plain = PATHS[0].name
    rows, reordered = [], {}
    for name in scorers:
        num_changed, num_compared = compare_rankings(scores[plain], scores[name])
        if num_changed and name != SHIPPED_BF16:
            reordered[name] = f"{num_changed} of {num_compared}"
        rows.append(
            {
                "path": name,
                "pairs/s": per_second(len(captions) * len(records), seconds[name]),
                f"speed (median, range of {args.rounds})": speed_ratio(seconds[plain], seconds[name]),
                "batch 1: ms": milliseconds(latencies[name]),
                "batch 1: speed": speed_ratio(latencies[plain], latencies[name]),
                "score difference": f"{np.abs(scores[name] - scores[plain]).max():.1e}",
                "same order": f"{100 * (1 - num_changed / max(num_compared, 1)):.2f} %",
            }
        )
    print_table(rows)
    print(f"Same order: of {num_compared:,} pairs of images whose scores for a caption differ by {TIE_MARGIN} or more")
    if reordered:
        raise SystemExit(f"Some float32 path orders the images of a caption unlike the plain path: {reordered}.")


if __name__ == "__main__":
    main()
