#!/usr/bin/env python
"""
Compares pretraining recipes: pretrains with each of them, with several seeds, and sets side by side what is measured at
the end, which is zero-shot retrieval, and what a task measures that each model is then finetuned on (`--finetuning`).

Two tiny runs on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/compare_pretraining.py --output_dir outputs/tiny_comparison --seeds 1 \\
        --recipes examples/recipes/flickr8k/mlm_mom.yaml examples/recipes/flickr8k/msm_mrm.yaml \\
        -- --dataset_name outputs/tiny_scenes --tokenizer_name outputs/tiny_scenes/tokenizer \\
        --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,\\
vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64 \\
        --retrieval_eval_size 20

The paper's objectives (its Table 4, of scores after finetuning: 69.0 for masked segments and regions in one stage, 69.6
for masked words and objects, 70.3 for both in two stages), on eight GPUs:

    python examples/compare_pretraining.py --output_dir outputs/objectives --seeds 1 2 \\
        --launcher "accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml" \\
        --recipes examples/recipes/one_stage_mlm_mom.yaml examples/recipes/one_stage_msm_mrm.yaml \\
            examples/recipes/two_stage.yaml \\
        --finetuning "run_image_retrieval.py --recipe examples/recipes/flickr30k_retrieval.yaml \\
            --dataset_name org/flickr30k-regions" \\
        -- --recipe examples/recipes/pretrain_base.yaml --dataset_name org/my-regions

With and without the weights of a BERT, otherwise alike:

    python examples/compare_pretraining.py --output_dir outputs/initialization --seeds 1 2 \\
        --recipes examples/recipes/flickr8k/two_stage.yaml \\
        --models "BERT=--bert_name_or_path MINILM" \\
            "scratch=--tokenizer_name MINILM --config_name outputs/initialization/two_stage-BERT-seed1" \\
        -- --recipe examples/recipes/flickr8k/pretrain.yaml --dataset_name FOLDER

What stands behind `--` are arguments of run_pretrain.py, which all runs get; a recipe among them comes before the one
that is compared. A comparison that was stopped goes on when the same command is given again; after each run it writes
what is there: `comparison.json`, `comparison.md` and `comparison.png`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from comparison import (
    add_models_argument,
    add_run_arguments,
    check_names,
    command_words,
    draw_bars,
    folder_name,
    print_comparison,
    run_once,
    write_comparison,
)

RECALLS = [f"eval_{direction}_recall_at_{k}" for direction in ("image", "text") for k in (1, 5, 10)]
# What is compared of each finetuning script, as far as it measures it.
FINETUNED = {"run_image_retrieval.py": RECALLS, "run_vqa.py": ["eval_vqa_score", "eval_accuracy"]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain with several recipes and compare what comes out.")
    parser.add_argument(
        "--recipes", nargs="+", type=Path, required=True, help="One YAML file for each way to pretrain."
    )
    add_models_argument(parser, "run_pretrain.py", required=False)
    parser.add_argument(
        "--finetuning",
        type=command_words,
        metavar="'SCRIPT ARGUMENTS'",
        help=f"What is pretrained is then finetuned by this script, {' or '.join(FINETUNED)}, with these arguments.",
    )
    add_run_arguments(parser, "run_pretrain.py", seeds=(1, 2))
    args = parser.parse_args()
    if args.finetuning is not None and args.finetuning[0] not in FINETUNED:
        parser.error(f"--finetuning: expected {' or '.join(FINETUNED)} and its arguments, got {args.finetuning[0]!r}")
    check_names(parser, "--recipes", [path.stem for path in args.recipes])
    check_names(parser, "--models", [name for name, _ in args.models])
    return args


def pretrain(
    args: argparse.Namespace, recipe: Path, name: str, own_arguments: list[str], seed: int
) -> dict[str, float]:
    """
    Pretrains, and finetunes what came out, unless that has been done.

    Returns:
        What was measured after the last epoch of both, of the finetuning as `finetuned_*`.
    """
    arguments = [*args.arguments, *own_arguments, "--recipe", str(recipe), "--seed", str(seed)]
    folder = args.output_dir / f"{folder_name(name)}-seed{seed}"
    measured = run_once("run_pretrain.py", arguments, folder, args.launcher)
    if args.finetuning is None:
        return measured
    script, *arguments = args.finetuning
    arguments = ["--do_train", "--do_eval", "--no_eval_every_epoch", *arguments]
    arguments += ["--model_name_or_path", str(folder), "--seed", str(seed)]
    finetuned = run_once(script, arguments, folder.with_name(f"{folder.name}-finetuned"), args.launcher)
    return measured | {f"finetuned_{name}": value for name, value in finetuned.items()}


def title_of(measure: str) -> str:
    return measure.replace("eval_", "").replace("_recall_at_", " R@").replace("_", " ")


def summarize(results: dict[str, dict[int, dict[str, float]]], measures: Sequence[str]) -> list[dict[str, str]]:
    """A row for each recipe: measures in percent, the mean over the seeds and, of several, the lowest and highest."""
    rows = []
    for name, runs in results.items():
        row = {"recipe": name}
        for measure in measures:
            values = [100 * run[measure] for run in runs.values()]
            spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
            row[title_of(measure)] = f"{np.mean(values):.1f}{spread}" if values else "-"
        rows.append(row)
    return rows


def main():
    args = parse_args()
    compared = {
        f"{recipe.stem}-{model}" if model else recipe.stem: (recipe, own_arguments)
        for recipe in args.recipes
        for model, own_arguments in args.models or [("", [])]
    }
    of_task = [] if args.finetuning is None else [f"finetuned_{name}" for name in FINETUNED[args.finetuning[0]]]
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in compared}
    for seed in args.seeds:
        for name, (recipe, own_arguments) in compared.items():
            measured = pretrain(args, recipe, name, own_arguments, seed)
            results[name][seed] = measured
            rows = summarize(results, [measure for measure in (*RECALLS, *of_task) if measure in measured])
            write_comparison(args.output_dir, results, rows)
            panels = {
                f"{title_of(measure)} (%)": {
                    name: [100 * run[measure] for run in runs.values()] for name, runs in results.items()
                }
                for measure in (of_task or RECALLS)[:3]
                if measure in measured
            }
            if panels:
                draw_bars(panels, args.output_dir / "comparison.png")
    print_comparison(args.output_dir, rows)


if __name__ == "__main__":
    main()
