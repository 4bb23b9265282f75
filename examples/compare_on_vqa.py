#!/usr/bin/env python
"""
Asks what the regions are worth for answering questions: finetunes a model with them and one of the questions alone
(`run_vqa.py --mask_regions`), both with the same recipe and several seeds, and says whether the gap between them is
significant.

A tiny model on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/compare_on_vqa.py --output_dir outputs/tiny_vqa_comparison --seeds 1 2 \\
        -- --dataset_name outputs/tiny_scenes --tokenizer_name outputs/tiny_scenes/tokenizer \\
        --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,\\
vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64 \\
        --learning_rate 1e-3 --num_train_epochs 3

DAQUAR, which has no validation split:

    python examples/compare_on_vqa.py --output_dir outputs/daquar --seeds 1 2 3 \\
        -- --recipe examples/recipes/daquar.yaml --dataset_name daquar --bert_name_or_path bert-base-uncased \\
        --train_questions daquar/train_questions.jsonl --answer_vocabulary daquar/answer_space.txt

What stands behind `--` are arguments of run_vqa.py, which all runs get. A comparison that was stopped goes on when the
same command is given again. It writes `comparison.json`, `comparison.md` and `comparison.png`: the score of the most
frequent answer to questions of the same type, those of both models (means and standard deviations, n - 1, over the
seeds) and the gap between them with a 95 % bootstrap interval. What is drawn again is the images, each with all of its
questions, which are not independent; the score of a question is its mean over the seeds. Where weights are averaged,
their answers are compared.
"""

import argparse
import json
from collections import defaultdict
from typing import Any

import numpy as np

from comparison import (
    add_keep_models_argument,
    add_run_arguments,
    draw_bars,
    format_scores,
    print_comparison,
    remove_weights,
    run_once,
    write_comparison,
)

MODELS = {"question_only": ["--mask_regions"], "with_regions": []}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune with and without regions and compare the answers.")
    parser.add_argument("--num_resamples", type=int, default=10_000, help="Draws of the bootstrap.")
    add_keep_models_argument(parser)
    add_run_arguments(parser, "run_vqa.py")
    return parser.parse_args()


def finetune(args: argparse.Namespace, model: str, seed: int) -> list[dict[str, Any]]:
    """Finetunes unless that has been done, and returns every question with its image and its scores."""
    folder = args.output_dir / f"{model}-seed{seed}"
    arguments = ["--do_train", "--do_eval", *args.arguments, *MODELS[model], "--seed", str(seed)]
    run_once("run_vqa.py", arguments, folder)
    if not args.keep_models:
        remove_weights(folder)
    return [json.loads(line) for line in (folder / "eval_predictions.jsonl").read_text("utf-8").splitlines()]


def gap_between(
    answers: dict[str, list[list[dict[str, Any]]]], num_resamples: int, seed: int = 0
) -> tuple[float, float, float]:
    """
    How much better a model answers with regions than without.

    Args:
        answers: By model, and for each seed, the questions with their images and scores, in the same order.
        num_resamples: Draws of the bootstrap.

    Returns:
        The difference of the mean scores, and the ends of its 95 % percentile interval over images.
    """
    from scipy.stats import bootstrap

    scores = {model: np.array([[row["score"] for row in rows] for rows in runs]) for model, runs in answers.items()}
    differences = scores["with_regions"].mean(axis=0) - scores["question_only"].mean(axis=0)
    by_image: defaultdict[str, list[float]] = defaultdict(list)
    for row, difference in zip(answers["with_regions"][0], differences.tolist(), strict=True):
        by_image[row["image_id"]].append(difference)
    sums, counts = (np.array([reduce(values) for values in by_image.values()]) for reduce in (sum, len))
    interval = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=num_resamples,
        batch=1_000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(differences.mean()), float(interval.low), float(interval.high)


def main():
    args = parse_args()
    answers: dict[str, list[list[dict[str, Any]]]] = {model: [] for model in MODELS}
    for seed in args.seeds:
        for model in MODELS:
            answers[model].append(finetune(args, model, seed))
    means = {
        model: [100 * float(np.mean([row["score"] for row in rows])) for rows in runs]
        for model, runs in answers.items()
    }
    rows = [{"model": model.replace("_", " "), "score (%)": format_scores(values)} for model, values in means.items()]
    questions = answers["with_regions"][0]
    if "type_baseline_score" in questions[0]:
        means = {"most_frequent": [100 * float(np.mean([row["type_baseline_score"] for row in questions]))]} | means
        rows.insert(
            0, {"model": "most frequent answer of the type", "score (%)": format_scores(means["most_frequent"])}
        )
    gap, low, high = (100 * value for value in gap_between(answers, args.num_resamples))
    rows.append({"model": "gap (95 % interval)", "score (%)": f"{gap:+.1f} ({low:+.1f} to {high:+.1f})"})
    results = {"scores": means, "gap": gap, "interval": [low, high]}
    write_comparison(args.output_dir, results, rows)
    draw_bars({"score (%)": means}, args.output_dir / "comparison.png")
    print_comparison(args.output_dir, rows)
    verdict = "significant: its 95 % interval leaves out 0" if low > 0 or high < 0 else "not significant"
    print(f"Over {len(questions):,} questions the gap is {verdict}.")


if __name__ == "__main__":
    main()
