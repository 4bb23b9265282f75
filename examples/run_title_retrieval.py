#!/usr/bin/env python
"""
Finetunes for the retrieval of products by texts, on so many images with their titles, with and without pretraining, and
sets side by side what is found (the paper's Figure 3): precision among the five best images, and recall.

Tiny models on generated scenes with Chinese captions, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/run_pretrain.py --dataset_name outputs/tiny_scenes --caption_column captions_zh \\
        --tokenizer_name outputs/tiny_scenes/tokenizer --output_dir outputs/tiny_pretrained --config_overrides \\
hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,vision_intermediate_size=128,\\
num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64
    python examples/build_queries.py outputs/tiny_scenes outputs/tiny_queries.jsonl --text_column captions_zh \\
        --pool_size 20
    python examples/run_title_retrieval.py --output_dir outputs/tiny_titles --seeds 1 --train_pairs 50 200 \\
        --models "pretrained=--model_name_or_path outputs/tiny_pretrained" \\
            "not pretrained=--config_name outputs/tiny_pretrained --tokenizer_name outputs/tiny_scenes/tokenizer" \\
        -- --dataset_name outputs/tiny_scenes --caption_column captions_zh --learning_rate 1e-3 \\
        --queries outputs/tiny_queries.jsonl

The paper's comparison, on products as build_title_dataset.py prepares them, with their categories as queries and four
images on each of eight GPUs at a time:

    python examples/build_queries.py org/my-products queries.jsonl --text_column categories
    python examples/run_title_retrieval.py --output_dir outputs/titles --seeds 1 2 3 \\
        --launcher "accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml" \\
        --models "pretrained=--model_name_or_path org/interbert-base-chinese" \\
            "not pretrained=--bert_name_or_path bert-base-chinese" \\
        -- --recipe examples/recipes/title_retrieval.yaml --per_device_train_batch_size 4 \\
        --dataset_name org/my-products --queries queries.jsonl

What stands behind `--` are arguments of run_image_retrieval.py, which all runs get, such as `--queries`: texts, each
with its relevant images and its pool. Without them the titles of the validation split are searched for, and P@5 is left
out: one image is right for a title, so that it would be a fifth of R@5.

What the paper counts as pairs are images with their titles here. They are drawn (`--num_train_images`): the same ones
for all models and seeds, and the smaller parts of the data are parts of the larger. A comparison that was stopped goes
on when the same command is given again; after each run it writes what is there: `comparison.json`, `comparison.md` and
`comparison.png`. The table has means and standard deviations (of a sample, n - 1) over the seeds, in percent, of the
last epoch: of the averaged weights, where there are such, with a row for the others.
"""

import argparse

from compare_on_retrieval import add_comparison_arguments, compare, count_training_images, read_run_arguments
from comparison import check_names

PRECISION = {"P@5": "precision_at_5"}
RECALLS = {f"R@{k}": f"image_recall_at_{k}" for k in (1, 5, 10)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune several models for title retrieval on parts of the data.")
    parser.add_argument(
        "--train_pairs",
        nargs="+",
        type=int,
        default=[10_000, 100_000, 200_000],
        help="Numbers of images that are finetuned on, each with its titles.",
    )
    add_comparison_arguments(parser)
    args = parser.parse_args()
    check_names(parser, "--models", [name for name, _ in args.models])
    if min(args.train_pairs) < 1:
        parser.error(f"--train_pairs: expected numbers of at least 1, got {args.train_pairs}")
    return args


def main():
    args = parse_args()
    runs = read_run_arguments(args)
    num_images = count_training_images(runs)
    if num_images < max(args.train_pairs):
        raise ValueError(
            f"`--train_pairs` {max(args.train_pairs):,} needs as many images to train on with regions and titles, got "
            f"{num_images:,}."
        )
    has_queries = all(retrieval_args.queries is not None for _, retrieval_args in runs.values())
    parts = {count: (f"{count}images", count) for count in args.train_pairs}
    compare(args, parts, PRECISION | RECALLS if has_queries else RECALLS, "training images")


if __name__ == "__main__":
    main()
