#!/usr/bin/env python
"""
Compares models on image retrieval by how much data they are finetuned on, as the paper's Figure 3 does: finetunes each
of them on parts of the training images with several seeds, all with the same recipe, and sets what is measured at the
end side by side.

Two tiny models on generated scenes, on a CPU, one of them pretrained:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/run_pretrain.py --dataset_name outputs/tiny_scenes --output_dir outputs/tiny_pretrained \\
        --tokenizer_name outputs/tiny_scenes/tokenizer --config_overrides hidden_size=64,num_attention_heads=2,\\
vision_num_attention_heads=2,intermediate_size=128,vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,\\
num_vision_layers=1,pooler_size=64
    python examples/compare_on_retrieval.py --output_dir outputs/tiny_retrieval_comparison --seeds 1 \\
        --models "pretrained=--model_name_or_path outputs/tiny_pretrained" \\
            "from scratch=--config_name outputs/tiny_pretrained --tokenizer_name outputs/tiny_scenes/tokenizer" \\
        -- --dataset_name outputs/tiny_scenes --learning_rate 1e-3

The paper's comparison (there of Chinese product titles), on the eight GPUs of its recipe. The recipe's 10,000 steps of
warm-up are more than a tenth of the images have:

    python examples/compare_on_retrieval.py --output_dir outputs/retrieval --seeds 1 2 3 \\
        --launcher "accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml" \\
        --models "pretrained=--model_name_or_path org/interbert-base" \\
            "not pretrained=--bert_name_or_path bert-base-uncased" \\
        -- --recipe examples/recipes/flickr30k_retrieval.yaml --num_warmup_steps 0.1 \\
        --dataset_name org/flickr30k-regions

At a size for one CPU:

    python examples/compare_on_retrieval.py --output_dir outputs/flickr8k_by_data --seeds 1 2 \\
        --models "pretrained=--model_name_or_path PRETRAINED" \\
            "not pretrained=--bert_name_or_path MINILM --layout release" \\
        -- --recipe examples/recipes/flickr8k_retrieval_by_data.yaml --dataset_name FOLDER

What stands behind `--` are arguments of run_image_retrieval.py, which all runs get. The parts of the training images
are drawn (`--num_train_images`): the same ones for all models and seeds, and the smaller ones parts of the larger. A
comparison that was stopped goes on when the same command is given again; after each run it writes what is there:
`comparison.json`, `comparison.md` and `comparison.png`. The table has means and standard deviations (of a sample,
n - 1) over the seeds, in percent, of the last epoch: of the averaged weights, where there are such, with a row for the
others.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from arguments import parse_arguments
from comparison import (
    add_keep_models_argument,
    add_models_argument,
    add_run_arguments,
    check_names,
    draw_lines,
    folder_name,
    format_scores,
    print_comparison,
    remove_weights,
    run_once,
    write_comparison,
)
from finetuning import TaskArguments
from processing import CaptionedImages
from run_image_retrieval import ARGUMENT_CLASSES, RetrievalArguments, choose_training_images

MEASURES = {
    f"{title} R@{k}": f"{direction}_recall_at_{k}"
    for direction, title in (("image", "caption → image"), ("text", "image → caption"))
    for k in (1, 5, 10)
}
# Model -> part of the data -> seed -> what was measured
Results = Mapping[str, Mapping[int, Mapping[int, Mapping[str, float]]]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune several models for image retrieval on parts of the data.")
    parser.add_argument(
        "--train_percents",
        nargs="+",
        type=int,
        default=[10, 50, 100],
        help="Parts of the training images that are finetuned on.",
    )
    add_comparison_arguments(parser)
    args = parser.parse_args()
    check_names(parser, "--models", [name for name, _ in args.models])
    if not all(0 < percent <= 100 for percent in args.train_percents):
        parser.error(f"--train_percents: expected numbers from 1 to 100, got {args.train_percents}")
    return args


def add_comparison_arguments(parser: argparse.ArgumentParser):
    add_models_argument(parser, "run_image_retrieval.py")
    add_keep_models_argument(parser)
    add_run_arguments(parser, "run_image_retrieval.py")


def run_arguments(args: argparse.Namespace, own_arguments: list[str]) -> list[str]:
    """What run_image_retrieval.py is given for a model, but for the part of the data and the seed."""
    return ["--do_train", "--do_eval", "--no_eval_every_epoch", *args.arguments, *own_arguments]


def read_run_arguments(args: argparse.Namespace) -> dict[str, tuple[TaskArguments, RetrievalArguments]]:
    """What run_image_retrieval.py makes of the arguments of each model. Ends the program where they cannot be."""
    runs = {}
    for name, own_arguments in args.models:
        words = [*run_arguments(args, own_arguments), "--output_dir", str(args.output_dir)]
        task_args, _, retrieval_args, _, _ = parse_arguments(ARGUMENT_CLASSES, f"Finetunes {name}.", words)
        runs[name] = task_args, retrieval_args
    return runs


def count_training_images(runs: Mapping[str, tuple[TaskArguments, RetrievalArguments]]) -> int:
    """
    Number of the images, with regions and captions, that all models are finetuned on parts of.

    Raises:
        ValueError: they are not the same for all models.
    """
    image_ids: dict[str, set[str]] = {}
    for name, (task_args, args) in runs.items():
        regions = choose_training_images(args.load_regions("train"), task_args, args)
        all_ids = regions.image_ids
        image_ids[name] = {all_ids[row] for row in CaptionedImages(regions, args.caption_column).usable_images}
    first_name, first_ids = next(iter(image_ids.items()))
    for name, ids in image_ids.items():
        if ids != first_ids:
            raise ValueError(
                f"Expected models that are finetuned on the same images, got {len(first_ids):,} for {first_name} and "
                f"{len(ids):,} for {name}, {len(ids & first_ids):,} of them the same."
            )
    return len(first_ids)


def finetune(
    args: argparse.Namespace, model: tuple[str, list[str]], part_name: str, num_images: int, seed: int
) -> dict[str, float]:
    """Finetunes unless that has been done, and returns what was measured after the last epoch."""
    name, own_arguments = model
    folder = args.output_dir / f"{folder_name(name)}-{part_name}-seed{seed}"
    arguments = [*run_arguments(args, own_arguments), "--num_train_images", str(num_images), "--seed", str(seed)]
    result = run_once("run_image_retrieval.py", arguments, folder, args.launcher)
    if not args.keep_models:
        remove_weights(folder)
    return result


def scores(runs: Mapping[int, Mapping[str, float]], measure: str, prefix: str) -> list[float]:
    """Of all seeds, in percent."""
    return [100 * run[prefix + measure] for run in runs.values() if prefix + measure in run]


def summarize(results: Results, measures: Mapping[str, str], unit: str) -> list[dict[str, str]]:
    """A row for each model and part of the data, and one for its raw weights if others are averaged."""
    rows = []
    for model, parts in results.items():
        for size, runs in parts.items():
            for name, prefix in ((model, "eval_"), (f"{model}, raw weights", "eval_raw_")):
                cells = {title: format_scores(scores(runs, measure, prefix)) for title, measure in measures.items()}
                if set(cells.values()) != {"-"}:
                    rows.append({"model": name, unit: f"{size:,}"} | cells)
    return rows


def compare(
    args: argparse.Namespace,
    parts: Mapping[int, tuple[str, int]],
    measures: Mapping[str, str],
    unit: str,
):
    """
    Finetunes each model on each part of the data with each seed, and writes the comparison after every run.

    Args:
        parts: By size, its name for a folder, and its number of images.
        measures: By title, names of what is measured; the first three are drawn.
        unit: What the sizes are.
    """
    results: dict[str, Any] = {name: {size: {} for size in parts} for name, _ in args.models}
    for seed in args.seeds:
        for size, (part_name, num_images) in parts.items():
            for model in args.models:
                results[model[0]][size][seed] = finetune(args, model, part_name, num_images, seed)
                rows = summarize(results, measures, unit)
                write_comparison(args.output_dir, results, rows)
                panels = {
                    f"{title} (%)": {
                        name: {size: scores(runs, measure, "eval_") for size, runs in own.items()}
                        for name, own in results.items()
                    }
                    for title, measure in list(measures.items())[:3]
                }
                draw_lines(panels, args.output_dir / "comparison.png", unit)
    print_comparison(args.output_dir, rows)


def main():
    args = parse_args()
    num_images = count_training_images(read_run_arguments(args))
    parts = {percent: (f"{percent}percent", round(num_images * percent / 100)) for percent in args.train_percents}
    compare(args, parts, MEASURES, "training images (%)")


if __name__ == "__main__":
    main()
