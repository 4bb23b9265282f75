#!/usr/bin/env python
"""
Draws the modules of an InterBERT with the sizes of its configuration, for model cards. That of the paper's base model:

    python examples/draw_architecture.py outputs/architecture.png

and of a checkpoint:

    python examples/draw_architecture.py outputs/architecture.png --config_name org/interbert-base
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from configuration_interbert import InterBERTConfig

IMAGE, TEXT, BOTH = "#cfe3f5", "#f7e0c4", "#d9ead3"
FUSIONS = {"mul": "product", "sum": "sum"}


def draw_architecture(config: InterBERTConfig) -> Figure:
    figure = Figure((7.2, 5.6))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(0, 7.8))
    ax.axis("off")
    left, right, middle = 2.6, 7.4, 5.0

    _box(ax, left, 0.6, 4.2, 0.8, IMAGE, f"regions of a detector\n{config.region_feature_size} features, box, area")
    _box(ax, right, 0.6, 4.2, 0.8, TEXT, "words\nWordPiece, position, type")
    _box(ax, left, 1.9, 4.2, 0.7, IMAGE, "the whole image, region 1, region 2, …")
    _box(ax, right, 1.9, 4.2, 0.7, TEXT, "[CLS], word 1, word 2, …, [SEP]")
    layers = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    _box(ax, middle, 3.3, 9.0, 0.9, BOTH, f"interaction module: {layers}\nevery region and word attends to all of both")
    # A stream without layers passes on what the interaction module gives.
    for x, colour, name, layers, others in (
        (left, IMAGE, "vision", config.num_vision_layers, "regions"),
        (right, TEXT, "text", config.num_text_layers, "words"),
    ):
        label = f"{name} stream: {layers} layers\n{others} attend to {others} alone" if layers else f"no {name} stream"
        _box(ax, x, 4.8, 4.2, 0.9, colour, label)
        _arrow(ax, (x, 1.0), (x, 1.55))
        _arrow(ax, (x, 2.25), (x, 2.85))
        _arrow(ax, (x, 3.75), (x, 4.35))
        _arrow(ax, (x, 5.25), (x, 6.85))
        _arrow(ax, (x, 5.25), (middle + (x - middle) * 0.2, 6.05))
    _box(ax, middle, 6.4, 2.7, 0.7, BOTH, f"pooled vectors: {FUSIONS[config.fusion]}")
    _arrow(ax, (middle, 6.75), (middle, 7.05))
    for x, label in ((left - 0.5, "masked regions"), (middle, "match, answer, choice"), (right + 0.5, "masked words")):
        ax.text(x, 7.25, label, ha="center", va="center", fontsize=10, fontweight="bold")
    return figure


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, label: str):
    """A box around a centre."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#555555"))
    ax.text(x, y, label, ha="center", va="center", fontsize=10)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]):
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#555555"})


def save_architecture(config: InterBERTConfig, path: Path):
    draw_architecture(config).savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Draw the modules of an InterBERT.")
    parser.add_argument("output", type=Path, help="File to write; the extension names the format.")
    parser.add_argument("--config_name", help="Checkpoint or configuration; by default the paper's base model.")
    args = parser.parse_args()
    config = InterBERTConfig() if args.config_name is None else InterBERTConfig.from_pretrained(args.config_name)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_architecture(config, args.output)
    print(f"Architecture: {args.output}")


if __name__ == "__main__":
    main()
