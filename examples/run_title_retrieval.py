#!/usr/bin/env python
"""
Finetunes for the retrieval of products by their titles, on so many pairs of a title and an image, with and without
pretraining, and sets side by side what is found (the paper's Figure 3): precision among the five best images, and
recall.

Tiny models on generated scenes with Chinese captions, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/run_pretrain.py --dataset_name outputs/tiny_scenes --caption_column captions_zh \\
        --tokenizer_name outputs/tiny_scenes/tokenizer --output_dir outputs/tiny_pretrained --config_overrides \\
hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,vision_intermediate_size=128,\\
num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64
    python examples/run_title_retrieval.py --output_dir outputs/tiny_titles --seeds 1 --train_pairs 50 200 \\
        --models "pretrained=--model_name_or_path outputs/tiny_pretrained" \\
            "not pretrained=--config_name outputs/tiny_pretrained --tokenizer_name outputs/tiny_scenes/tokenizer" \\
        -- --dataset_name outputs/tiny_scenes --caption_column captions_zh --learning_rate 1e-3

The paper's comparison, on products as build_title_dataset.py prepares them:

    python examples/run_title_retrieval.py --output_dir outputs/titles --seeds 1 2 3 \\
        --models "pretrained=--model_name_or_path org/interbert-base-chinese" \\
            "not pretrained=--bert_name_or_path bert-base-chinese" \\
        -- --recipe examples/recipes/title_retrieval.yaml --dataset_name org/my-products --queries queries.jsonl

What stands behind `--` are arguments of run_image_retrieval.py, which all runs get, such as `--queries`: texts with the
relevant images and the pools of all. A pair is an image with its titles. A comparison that was stopped goes on when the
same command is given again; after each run it writes what is there: `comparison.json`, `comparison.md` and
`comparison.png`. The table has means and standard deviations (of a sample, n - 1) over the seeds, in percent, of the
last epoch: of the averaged weights, where there are such, with a row for the others.
"""

import argparse

from compare_on_retrieval import add_comparison_arguments, compare
from comparison import check_names

MEASURES = {"P@5": "precision_at_5"} | {f"R@{k}": f"image_recall_at_{k}" for k in (1, 5, 10)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune several models for title retrieval on parts of the data.")
    parser.add_argument(
        "--train_pairs",
        nargs="+",
        type=int,
        default=[10_000, 100_000, 200_000],
        help="Numbers of pairs that are finetuned on, the first ones of the training split.",
    )
    add_comparison_arguments(parser)
    args = parser.parse_args()
    check_names(parser, "--models", [name for name, _ in args.models])
    if min(args.train_pairs) < 1:
        parser.error(f"--train_pairs: expected numbers of at least 1, got {args.train_pairs}")
    return args


def main():
    args = parse_args()
    parts = {count: (f"{count}pairs", ["--max_train_samples", str(count)]) for count in args.train_pairs}
    compare(args, parts, MEASURES, "training pairs")


if __name__ == "__main__":
    main()
