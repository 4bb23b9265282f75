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

VQA 2.0, on the eight GPUs of its recipe:

    python examples/compare_on_vqa.py --output_dir outputs/vqa2 --seeds 1 2 3 \\
        --launcher "accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml" \\
        -- --recipe examples/recipes/vqa2.yaml --dataset_name org/coco-regions \\
        --model_name_or_path org/interbert-base \\
        --train_questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --train_annotations v2_mscoco_train2014_annotations.json \\
        --validation_questions v2_OpenEnded_mscoco_val2014_questions.json \\
        --validation_annotations v2_mscoco_val2014_annotations.json

What stands behind `--` are arguments of run_vqa.py, which all runs get. A comparison that was stopped goes on when the
same command is given again. It writes `comparison.json`, `comparison.md` and `comparison.png`: the scores of the most
frequent answers to questions of the same type and to the same question, those of both models (means and standard
deviations, n - 1, over the seeds), the gap of each seed, and their mean with a 95 % bootstrap interval, which is about
other images and other seeds. Where weights are averaged, their answers are compared, and the others have rows of
their own.
"""

import argparse
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

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
from processing.tasks.files import read_records

MODELS = {"question_only": ["--mask_regions"], "with_regions": []}
# By names in the files of predictions.
BASELINES = {
    "type_baseline": "most frequent answer of the type",
    "question_baseline": "most frequent answer to the same question",
}
# What a run says of each question, by the ids of its image and of the question.
Answers = dict[tuple[str, int | str], dict[str, Any]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune with and without regions and compare the answers.")
    parser.add_argument("--num_resamples", type=int, default=10_000, help="Draws of the bootstrap.")
    add_keep_models_argument(parser)
    add_run_arguments(parser, "run_vqa.py")
    return parser.parse_args()


def finetune(args: argparse.Namespace, model: str, seed: int) -> tuple[Answers, float | None]:
    """
    Finetunes unless that has been done.

    Returns:
        What was answered, with scores, and where weights are averaged, the mean score of those that are not.
    """
    folder = args.output_dir / f"{model}-seed{seed}"
    arguments = [
        "--do_train",
        "--do_eval",
        "--no_eval_every_epoch",
        *args.arguments,
        *MODELS[model],
        "--seed",
        str(seed),
    ]
    measured = run_once("run_vqa.py", arguments, folder, args.launcher)
    if not args.keep_models:
        remove_weights(folder)
    rows = read_records(folder / "eval_predictions.jsonl")
    answers = {(row["image_id"], row["question_id"]): dict(row) for row in rows}
    return answers, measured.get("eval_raw_vqa_score", measured.get("eval_raw_accuracy"))


class Gap(NamedTuple):
    """
    Args:
        mean: Mean of the seeds.
        low, high: Ends of its 95 % interval.
        of_seeds: Of each seed.
    """

    mean: float
    low: float
    high: float
    of_seeds: list[float]


def scores_by_question(runs: Sequence[Answers], questions: Collection[tuple[str, int | str]], model: str) -> np.ndarray:
    """
    Scores of all runs of a model, float `(runs, questions)`.

    Raises:
        ValueError: a run has answered other questions.
    """
    for run in runs:
        others = sorted(run.keys() ^ set(questions), key=str)
        if others:
            raise ValueError(
                f"Runs are compared with the same questions, got {len(others):,} (of image, question) that a run of "
                f"{model} lacks or has alone: {others[:5]}."
            )
    return np.array([[run[question]["score"] for question in questions] for run in runs])


def gap_between(answers: Mapping[str, Sequence[Answers]], num_resamples: int, seed: int = 0) -> Gap:
    """
    How much better a model answers with regions than without, for other images and other seeds.

    A draw of the bootstrap is the mean difference on images drawn again (each with all of its questions, which are not
    independent), plus what other seeds change: the standard error of the gaps of the seeds times a draw of Student's
    distribution. (Seeds drawn again from three would give an interval that at best ends at the lowest and the highest
    gap, and holds the true one in 1 - 2 / 2³ = 75 % of cases.)

    In simulations with 2 to 10 seeds the interval held the true gap in 94 to 100 % of cases: what chance does to single
    questions in single runs is in both parts, which makes it wide rather than narrow. It remains too narrow where few
    seeds are not normally distributed, for fewer than about 30 images, and, with one seed, for all that another seed
    would change. Other divisions of the data and other pretrained checkpoints are not in it.

    Args:
        answers: By model, what the run of each seed has answered. Runs have the same questions, in any order.
        num_resamples: Draws of the bootstrap.
        seed: Of these draws.

    Raises:
        ValueError: a run has answered other questions.
    """
    from scipy.stats import bootstrap

    questions = list(answers["with_regions"][0])
    scores = {model: scores_by_question(runs, questions, model) for model, runs in answers.items()}
    differences = scores["with_regions"] - scores["question_only"]
    by_image: defaultdict[str, list[float]] = defaultdict(list)
    for (image_id, _), difference in zip(questions, differences.mean(axis=0).tolist(), strict=True):
        by_image[image_id].append(difference)
    sums, counts = (np.array([reduce(values) for values in by_image.values()]) for reduce in (sum, len))
    generator = np.random.default_rng(seed)
    draws = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=num_resamples,
        batch=1_000,
        rng=generator,
    ).bootstrap_distribution
    of_seeds = differences.mean(axis=1)
    if len(of_seeds) > 1:
        standard_error = of_seeds.std(ddof=1) / len(of_seeds) ** 0.5
        draws = draws + standard_error * generator.standard_t(len(of_seeds) - 1, num_resamples)
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return Gap(float(of_seeds.mean()), low, high, of_seeds.tolist())


def main():
    args = parse_args()
    answers: dict[str, list[Answers]] = {model: [] for model in MODELS}
    raw_scores: dict[str, list[float]] = {f"{model}, raw weights": [] for model in MODELS}
    for seed in args.seeds:
        for model in MODELS:
            answers_of_run, raw_score = finetune(args, model, seed)
            answers[model].append(answers_of_run)
            if raw_score is not None:
                raw_scores[f"{model}, raw weights"].append(100 * raw_score)
    gap = gap_between(answers, args.num_resamples)
    questions = answers["with_regions"][0].values()

    def mean_score(rows: Collection[dict[str, Any]], column: str = "score") -> float:
        return 100 * float(np.mean([row[column] for row in rows]))

    means = {baseline: [mean_score(questions, f"{baseline}_score")] for baseline in BASELINES}
    means |= {model: [mean_score(run.values()) for run in runs] for model, runs in answers.items()}
    means |= {name: scores for name, scores in raw_scores.items() if scores}
    rows = [
        {"model": BASELINES.get(name, name.replace("_", " ")), "score (%)": format_scores(values)}
        for name, values in means.items()
    ]
    mean, low, high, *of_seeds = (100 * value for value in (gap.mean, gap.low, gap.high, *gap.of_seeds))
    rows.append({"model": "gap (95 % interval)", "score (%)": f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"})
    rows.append({"model": "gap of each seed", "score (%)": ", ".join(f"{value:+.1f}" for value in of_seeds)})
    results = {"scores": means, "gap": mean, "interval": [low, high], "gap_of_each_seed": of_seeds}
    write_comparison(args.output_dir, results, rows)
    draw_bars({"score (%)": means}, args.output_dir / "comparison.png")
    print_comparison(args.output_dir, rows)
    verdict = "significant: its 95 % interval leaves out 0" if low > 0 or high < 0 else "not significant"
    print(f"Over {len(questions):,} questions and {len(args.seeds)} seeds the gap is {verdict}.")
    if len(args.seeds) == 1:
        print("With one seed, the interval is about these two models on other images, not about other trainings.")


if __name__ == "__main__":
    main()
