"""What the comparisons of trained models share: their arguments, runs that are not repeated, a table, a plot."""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml

from files import file_digest, write_json, write_text
from training import format_table

EXAMPLES = Path(__file__).resolve().parent
# So much of each file of a folder is looked at: weights and Parquet files that differ do so in their first tensors and
# pages.
DIGEST_BYTES = 2**20

# ---------------------------------------------------------------- arguments


def named_arguments(text: str) -> tuple[str, list[str]]:
    """A name and arguments, from `NAME=ARGUMENTS`."""
    name, separator, arguments = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=ARGUMENTS, got {text!r}")
    return name, shlex.split(arguments)


def add_models_argument(parser: argparse.ArgumentParser, script: str, required: bool = True):
    """Adds `--models`, names and arguments of what is compared."""
    parser.add_argument(
        "--models",
        nargs="+",
        type=named_arguments,
        required=required,
        default=[],
        metavar="NAME=ARGUMENTS",
        help=f"What is compared: names, and the arguments of {script} for each.",
    )


def command_words(text: str) -> list[str]:
    """The words of a command, of which there is at least one."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a command, got {text!r}: {error}") from error
    if not words:
        raise argparse.ArgumentTypeError(f"expected a command, got {text!r}")
    return words


class DistinctValues(argparse.Action):
    """Ends the program where a value is given twice: its run would count as two."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(set(values)) < len(values):
            parser.error(f"{option_string}: expected different values, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, values)


def add_run_arguments(parser: argparse.ArgumentParser, script: str, seeds: Sequence[int] = (1, 2, 3)):
    """Adds where the runs are, with which seeds, what starts them, and what they share."""
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        action=DistinctValues,
        default=list(seeds),
        help="Every run is made with each.",
    )
    parser.add_argument(
        "--launcher",
        type=command_words,
        default=[],
        metavar="COMMAND",
        help=f"What starts {script}, such as 'accelerate launch --multi_gpu'. By default this Python, as one process.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the runs and the comparison.")
    parser.add_argument("arguments", nargs="*", help=f"Behind --: arguments of {script} for all runs.")


def add_keep_models_argument(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--keep_models", action="store_true", help="Keeps the weights of the finetuned models, which go otherwise."
    )


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def check_names(parser: argparse.ArgumentParser, option: str, names: Sequence[str]):
    """Ends the program where two runs would have one folder."""
    if len({folder_name(name) for name in names}) < len(names):
        parser.error(f"{option}: expected names that make different folders, got {', '.join(names)}")


# ---------------------------------------------------------------- runs


def named_inputs(words: Iterable[str]) -> Iterator[str]:
    """Those words of a command that are local files or folders, and those of the recipes among them."""
    for word in words:
        name = word.partition("=")[2] if word.startswith("--") else word
        if os.path.exists(os.path.expanduser(name)):
            yield name
            if name.endswith(".yaml"):
                recipe = yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
                values = recipe.values() if isinstance(recipe, dict) else ()
                for value in values:
                    yield from named_inputs(map(str, value if isinstance(value, list) else [value]))


def contents_digest(path: Path, output_dir: Path) -> str:
    """
    SHA-256 of a file; of a folder, of the names, the sizes and the first mebibytes of its files.

    Args:
        output_dir: Where a comparison writes, which does not count where it is a part of the folder.
    """
    path, output_dir = path.expanduser().resolve(), output_dir.resolve()
    if path.is_file():
        return file_digest(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        is_output = path in output_dir.parents and output_dir in file.parents
        if file.is_file() and not is_output:
            with open(file, "rb") as opened:
                beginning = hashlib.sha256(opened.read(DIGEST_BYTES)).hexdigest()
            digest.update(f"{file.relative_to(path).as_posix()}\t{file.stat().st_size}\t{beginning}\n".encode())
    return digest.hexdigest()


def check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]):
    """
    Raises:
        ValueError: a folder holds a run of another command, or one that read something else; the message says what.
    """
    remedy = "remove it, or choose another `--output_dir`."
    if before["command"] != now["command"]:
        raise ValueError(
            f"{folder} must be a run of {shlex.join(now['command'])}, got one of {shlex.join(before['command'])}: "
            + remedy
        )
    names = {**before["contents"], **now["contents"]}
    changed = [name for name in names if before["contents"].get(name) != now["contents"].get(name)]
    if changed:
        raise ValueError(
            f"{folder} must be a run that has read what there is now, got one from before a change of "
            f"{', '.join(changed)}: " + remedy
        )


def run_once(script: str, arguments: Sequence[str], folder: Path, launcher: Sequence[str]) -> dict[str, float]:
    """
    Trains, from the newest checkpoint on if there is one, unless that has been done.

    A run is known by its command and by the contents of all local files and folders that this names (`run.json`). What
    is on the Hub is known by its name alone.

    Args:
        script: Name of a training script in this folder.
        arguments: For it, without those that say where to write.
        folder: Where it writes, within the folder of the comparison.
        launcher: The words of a command that is put before the script; where there are none, this Python.

    Returns:
        What was measured after the last epoch.

    Raises:
        ValueError: the folder holds another run, or the arguments hold a token, which would be written down.
    """
    if any(re.match("--hub[-_]t", word) for word in arguments):  # however it is written or shortened
        raise ValueError(
            "`--hub_token` would be written down with every run: log in with `hf auth login`, or set HF_TOKEN."
        )
    record = folder / "run.json"
    inputs = named_inputs([*launcher, *arguments])
    contents = {name: contents_digest(Path(name), folder.parent) for name in inputs}
    run = {"command": [*launcher, script, *arguments], "contents": contents}
    if record.exists():
        check_same_run(folder, json.loads(record.read_text(encoding="utf-8")), run)
    elif (folder / "config.json").exists() or any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"{folder} must be a run of this comparison, with {record.name}, got a model without: remove it, or choose "
            "another `--output_dir`."
        )
    if not (folder / "config.json").exists():
        write_json(record, run)
        command = [str(EXAMPLES / script), *arguments]
        command += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        print(f"\n$ {shlex.join([*(launcher or ['python']), *command])}\n", flush=True)
        run_to_its_end([*(launcher or [sys.executable]), *command])
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))[-1]


def run_to_its_end(command: Sequence[str]):
    """
    Runs a command. What stops this process is for the command and all that it has started, and ends this process once
    that has ended: it would otherwise go on alone, and with another one beside it once the comparison is started again.

    Raises:
        subprocess.CalledProcessError: it failed.
        SystemExit: it was stopped.
    """
    stopped_by: list[int] = []
    process = subprocess.Popen(command, start_new_session=True)

    def stop(signal_number: int, frame):
        stopped_by.append(signal_number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped_by:
        raise SystemExit(128 + stopped_by[0])
    if status:
        raise subprocess.CalledProcessError(status, command)


def remove_weights(folder: Path):
    """Removes the weights of a finished run and its checkpoints; what was measured stays."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


# ---------------------------------------------------------------- results


def format_scores(values: Sequence[float]) -> str:
    """Mean and standard deviation (of a sample, n - 1)."""
    if len(values) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    return f"{values[0]:.1f}" if values else "-"


def write_comparison(folder: Path, results: Any, rows: Sequence[Mapping[str, str]]):
    """Writes what was measured as `comparison.json`, and a table of it as `comparison.md`."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    write_json(folder / "comparison.json", results)
    write_text(folder / "comparison.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def print_comparison(folder: Path, rows: Sequence[Mapping[str, str]]):
    """Prints the table, and where it is."""
    names = [path.name for path in sorted(folder.glob("comparison.*"))]
    print(f"\n{format_table(rows)}\n\nAlso in {folder}: {', '.join(names)}")


@contextmanager
def open_panels(titles: Sequence[str], path: Path) -> Iterator[list[Any]]:
    """Axes side by side, one for each title; what is drawn on them becomes an image file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (axes,) = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.6), layout="constrained", squeeze=False)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    yield list(axes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path):
    """
    Draws a bar for the mean and a dot for each value.

    Args:
        panels: By title, values by what is compared. All panels have the same names, in the same order.
        path: Image file.
    """
    with open_panels(list(panels), path) as axes:
        for axis, groups in zip(axes, panels.values(), strict=True):
            for position, values in enumerate(groups.values()):
                if values:
                    axis.bar(position, np.mean(values), width=0.6, color="#8da0cb")
                axis.scatter([position] * len(values), values, color="#333333", s=14, zorder=2)
            axis.set_xticks(range(len(groups)), [re.sub("[_ ]", "\n", name) for name in groups], fontsize=8)


def draw_lines(panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], path: Path, label: str):
    """
    Draws a line through the means and a dot for each value.

    Args:
        panels: By title, by what is compared, values by position.
        path: Image file.
        label: What the positions are.
    """
    with open_panels(list(panels), path) as axes:
        for axis, lines in zip(axes, panels.values(), strict=True):
            for name, values_at in lines.items():
                positions = [position for position, values in values_at.items() if values]
                (line,) = axis.plot(positions, [np.mean(values_at[position]) for position in positions], label=name)
                for position in positions:
                    values = values_at[position]
                    axis.scatter([position] * len(values), values, color=line.get_color(), s=14)
            axis.set_xlabel(label, fontsize=9)
        axes[0].legend(fontsize=8)
