#!/usr/bin/env python
"""
Compares pretraining recipes: pretrains with each of them, with several seeds, and sets side by side what is measured at
the end, which is zero-shot retrieval.

The paper's Table 4 compares objectives by scores after finetuning (69.0 for masked segments and regions in one stage,
69.6 for masked words and objects, 70.3 for both in two stages): for a table of that kind, finetune what is pretrained
here, as compare_on_retrieval.py does with the models that it is given.

Two tiny runs on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/compare_pretraining.py --output_dir outputs/tiny_comparison --seeds 1 \\
        --recipes examples/recipes/flickr8k/mlm_mom.yaml examples/recipes/flickr8k/msm_mrm.yaml \\
        -- --dataset_name outputs/tiny_scenes --tokenizer_name outputs/tiny_scenes/tokenizer \\
        --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,\\
vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64 \\
        --retrieval_eval_size 20

The paper's objectives, on eight GPUs:

    python examples/compare_pretraining.py --output_dir outputs/objectives --seeds 1 2 \\
        --launcher "accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml" \\
        --base_recipe examples/recipes/pretrain_base.yaml --recipes examples/recipes/one_stage_mlm_mom.yaml \\
            examples/recipes/one_stage_msm_mrm.yaml examples/recipes/two_stage.yaml \\
        -- --dataset_name org/my-regions

With and without the weights of a BERT, otherwise alike:

    python examples/compare_pretraining.py --output_dir outputs/initialization --seeds 1 2 \\
        --base_recipe examples/recipes/flickr8k/pretrain.yaml --recipes examples/recipes/flickr8k/two_stage.yaml \\
        --models "BERT=--bert_name_or_path MINILM" \\
            "scratch=--tokenizer_name MINILM --config_name outputs/initialization/two_stage-BERT-seed1" \\
        -- --dataset_name FOLDER

What stands behind `--` are arguments of run_pretrain.py, which all runs get. A comparison that was stopped goes on when
the same command is given again. It writes `comparison.json`, `comparison.md` and `comparison.png`.
"""

import argparse
from pathlib import Path

import numpy as np

from comparison import (
    add_models_argument,
    add_run_arguments,
    check_names,
    draw_bars,
    folder_name,
    print_comparison,
    run_once,
    write_comparison,
)

RECALLS = [f"eval_{direction}_recall_at_{k}" for direction in ("image", "text") for k in (1, 5, 10)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain with several recipes and compare what comes out.")
    parser.add_argument(
        "--recipes", nargs="+", type=Path, required=True, help="One YAML file for each way to pretrain."
    )
    parser.add_argument("--base_recipe", type=Path, help="YAML file of what all of them share.")
    add_models_argument(parser, "run_pretrain.py", required=False)
    add_run_arguments(parser, "run_pretrain.py", seeds=(1, 2))
    args = parser.parse_args()
    check_names(parser, "--recipes", [path.stem for path in args.recipes])
    check_names(parser, "--models", [name for name, _ in args.models])
    return args


def pretrain(
    args: argparse.Namespace, recipe: Path, name: str, own_arguments: list[str], seed: int
) -> dict[str, float]:
    """Pretrains unless that has been done, and returns what was measured after the last epoch."""
    recipes = [str(path) for path in (args.base_recipe, recipe) if path is not None]
    arguments = ["--recipe", *recipes, *args.arguments, *own_arguments, "--seed", str(seed)]
    return run_once("run_pretrain.py", arguments, args.output_dir / f"{folder_name(name)}-seed{seed}", args.launcher)


def summarize(results: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, str]]:
    """A row for each recipe: recalls in percent, the mean over the seeds and, of several, the lowest and highest."""
    rows = []
    for name, runs in results.items():
        row = {"recipe": name}
        for recall in RECALLS:
            values = [100 * run[recall] for run in runs.values() if recall in run]
            if values:
                spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
                column = recall.removeprefix("eval_").replace("_recall_at_", " R@")
                row[column] = f"{np.mean(values):.1f}{spread}"
        rows.append(row)
    return rows


def main():
    args = parse_args()
    compared = {
        f"{recipe.stem}-{model}" if model else recipe.stem: (recipe, own_arguments)
        for recipe in args.recipes
        for model, own_arguments in args.models or [("", [])]
    }
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in compared}
    for seed in args.seeds:
        for name, (recipe, own_arguments) in compared.items():
            results[name][seed] = pretrain(args, recipe, name, own_arguments, seed)
    rows = summarize(results)
    write_comparison(args.output_dir, results, rows)
    if len(rows[0]) > 1:
        panels = {
            f"caption → image, R@{recall.rsplit('_', 1)[1]} (%)": {
                name: [100 * run[recall] for run in runs.values()] for name, runs in results.items()
            }
            for recall in RECALLS[:3]
        }
        draw_bars(panels, args.output_dir / "comparison.png")
    print_comparison(args.output_dir, rows)


if __name__ == "__main__":
    main()
