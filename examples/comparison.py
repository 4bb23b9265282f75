"""What the comparisons of trained models share: runs that are not repeated, a table, a plot."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from files import write_json, write_text
from training import format_table

EXAMPLES = Path(__file__).resolve().parent


def run_once(script: str, arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """
    Trains, from the newest checkpoint on if there is one, unless that has been done.

    Args:
        script: Name of a training script in this folder.
        arguments: For it, without those that say where to write.
        folder: Where it writes.

    Returns:
        What was measured after the last epoch.

    Raises:
        ValueError: the folder holds a model that was trained with other arguments.
    """
    record = folder / "arguments.json"
    if not (folder / "config.json").exists():
        command = [str(EXAMPLES / script), *arguments]
        command += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        print(f"\n$ python {shlex.join(command)}\n", flush=True)
        subprocess.run([sys.executable, *command], check=True)
        write_json(record, list(arguments))
    elif record.exists() and (trained_with := json.loads(record.read_text(encoding="utf-8"))) != list(arguments):
        raise ValueError(
            f"{folder} must be a run with the arguments {shlex.join(arguments)}, got one with "
            f"{shlex.join(trained_with)}: remove it, or choose another `--output_dir`."
        )
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))[-1]


def write_comparison(folder: Path, results: Any, rows: Sequence[Mapping[str, str]]):
    """Writes what was measured as `comparison.json`, and a table of it as `comparison.md`."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    write_json(folder / "comparison.json", results)
    write_text(folder / "comparison.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def print_comparison(folder: Path, rows: Sequence[Mapping[str, str]]):
    """Prints the table, and where it is."""
    names = [path.name for path in sorted(folder.glob("comparison.*"))]
    print(f"\n{format_table(rows)}\n\nAlso in {folder}: {', '.join(names)}")


def draw_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path):
    """
    Draws a bar for the mean and a dot for each value.

    Args:
        panels: By title, values by what is compared. All panels have the same names, in the same order.
        path: Image file.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, groups) in zip(axes[0], panels.items(), strict=True):
        for position, values in enumerate(groups.values()):
            if values:
                axis.bar(position, np.mean(values), width=0.6, color="#8da0cb")
            axis.scatter([position] * len(values), values, color="#333333", s=14, zorder=2)
        axis.set_xticks(range(len(groups)), [name.replace("_", "\n") for name in groups], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
