#!/usr/bin/env python
"""
Compares models on the text-only tasks of GLUE, as the paper's Table 5 does: finetunes each of them on each task with
several seeds, all with the same recipe, and sets what is measured at the end side by side.

An untrained BERT, an InterBERT that starts from it, and its single-stream variant, tiny, on generated sentences and on
a CPU, in a few minutes:

    python examples/generate_glue.py outputs/tiny_glue
    python examples/compare_on_glue.py --output_dir outputs/tiny_glue_comparison --tasks cola rte --seeds 1 2 \\
        --models "BERT=--architecture bert" "InterBERT=--layout release" \\
            "single stream=--config_overrides num_text_layers=0,num_vision_layers=0" \\
        -- --data_dir outputs/tiny_glue --bert_name_or_path outputs/tiny_glue/bert \\
        --per_device_train_batch_size 16 --learning_rate 1e-3 --num_train_epochs 3

The paper's comparison on one GPU, with an InterBERT before and after its pretraining; SST-2 with a part of its
training data held out, if its folder has no dev.tsv:

    python examples/compare_on_glue.py --output_dir outputs/glue --tasks cola sst2 stsb rte --seeds 1 2 3 \\
        --launcher "accelerate launch --num_processes 1 --mixed_precision bf16" \\
        --models "BERT=--architecture bert --bert_name_or_path bert-base-uncased" \\
            "single stream=--model_name_or_path outputs/single_stream_pretrained" \\
            "InterBERT before=--bert_name_or_path bert-base-uncased" \\
            "InterBERT=--model_name_or_path outputs/pretrained" \\
        --task_arguments "sst2=--validation_fraction 0.02" \\
        -- --recipe examples/recipes/glue.yaml --data_dir GLUE

What stands behind `--` are arguments of run_glue.py, which all runs get. A comparison that was stopped goes on when the
same command is given again; after each run it writes what is there: `comparison.json`, `comparison.md` and
`comparison.png`. The table has means and standard deviations (of a sample, n - 1) over the seeds, in percent, of the
last epoch: of the averaged weights, where there are such, with a row for the others.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from comparison import (
    add_keep_models_argument,
    add_models_argument,
    add_run_arguments,
    check_names,
    draw_bars,
    folder_name,
    format_scores,
    named_arguments,
    print_comparison,
    remove_weights,
    run_once,
    write_comparison,
)
from processing.tasks import GLUE_TASKS

# Task -> its metrics in the results, and how they are called.
METRICS = {
    "cola": {"matthews_correlation": "Matthews"},
    "sst2": {"accuracy": "accuracy"},
    "stsb": {"pearson": "Pearson", "spearmanr": "Spearman"},
    "rte": {"accuracy": "accuracy"},
}
# Model -> task -> seed -> what was measured
Results = Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune several models on GLUE and compare them.")
    add_models_argument(parser, "run_glue.py")
    parser.add_argument("--tasks", nargs="+", default=list(GLUE_TASKS), choices=list(GLUE_TASKS), help="Tasks of GLUE.")
    parser.add_argument(
        "--task_arguments",
        nargs="+",
        type=named_arguments,
        default=[],
        metavar="TASK=ARGUMENTS",
        help="Further arguments of run_glue.py for all runs of a task.",
    )
    add_keep_models_argument(parser)
    add_run_arguments(parser, "run_glue.py")
    args = parser.parse_args()
    check_names(parser, "--models", [name for name, _ in args.models])
    unknown = {task for task, _ in args.task_arguments} - set(GLUE_TASKS)
    if unknown:
        parser.error(f"--task_arguments: expected tasks of {', '.join(GLUE_TASKS)}, got {', '.join(sorted(unknown))}")
    return args


def finetune(args: argparse.Namespace, model: tuple[str, list[str]], task: str, seed: int) -> dict[str, float]:
    """Finetunes unless that has been done, and returns what was measured after the last epoch."""
    name, own_arguments = model
    folder = args.output_dir / f"{folder_name(name)}-{task}-seed{seed}"
    of_task = [argument for other, arguments in args.task_arguments if other == task for argument in arguments]
    arguments = [
        "--do_train",
        "--do_eval",
        "--no_eval_every_epoch",
        "--task_name",
        task,
        *args.arguments,
        *of_task,
        *own_arguments,
    ]
    result = run_once("run_glue.py", [*arguments, "--seed", str(seed)], folder, args.launcher)
    if not args.keep_models:
        remove_weights(folder)
    return result


def scores(results: Results, raw: bool = False) -> dict[str, dict[str, list[float]]]:
    """By column of the table and by model, the scores of all seeds in percent."""
    prefix = "eval_raw_" if raw else "eval_"
    tasks = list(dict.fromkeys(task for runs in results.values() for task in runs))
    return {
        f"{GLUE_TASKS[task].title} {title}": {
            model: [
                100 * run[prefix + metric]
                for run in runs.get(task, {}).values()
                if run.get(prefix + metric) is not None  # scores that are all the same have no correlation
            ]
            for model, runs in results.items()
        }
        for task in tasks
        for metric, title in METRICS[task].items()
    }


def majority_accuracies(results: Results) -> dict[str, str]:
    """By column, of accuracies only, that of the most frequent class."""
    return {
        f"{GLUE_TASKS[task].title} accuracy": f"{100 * run['majority_accuracy']:.1f}"
        for runs in results.values()
        for task, seeds in runs.items()
        for run in seeds.values()
        if "accuracy" in METRICS[task]
    }


def summarize(results: Results) -> list[dict[str, str]]:
    """A row for the most frequent class, for each model, and for its raw weights if others are averaged."""
    columns, raw = scores(results), scores(results, raw=True)
    majority = majority_accuracies(results)
    rows = [{"model": "most frequent class"} | {column: majority.get(column, "-") for column in columns}]
    for model in results:
        for name, table in ((model, columns), (f"{model}, raw weights", raw)):
            cells = {column: format_scores(by_model[model]) for column, by_model in table.items()}
            if set(cells.values()) != {"-"}:
                rows.append({"model": name} | cells)
    return rows


def main():
    args = parse_args()
    results: dict[str, Any] = {name: {task: {} for task in args.tasks} for name, _ in args.models}
    for seed in args.seeds:
        for task in args.tasks:
            for model in args.models:
                results[model[0]][task][seed] = finetune(args, model, task, seed)
                rows = summarize(results)
                write_comparison(args.output_dir, results, rows)
                draw_bars(scores(results), args.output_dir / "comparison.png")
    print_comparison(args.output_dir, rows)


if __name__ == "__main__":
    main()
