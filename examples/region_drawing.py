"""Boxes with labels on a picture, for the scripts that draw regions."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

CANVAS = "#404040"  # where there is no picture
FONT_SIZE = 8  # points
LABEL_PADDING = 0.15  # around the text of a label, as a share of the font size

# matplotlib's own font has no Chinese characters: the first of these that is installed lends them.
CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Microsoft YaHei", "SimHei", "Arial Unicode MS"),
)


def set_fonts():
    """Has matplotlib write Chinese where a font for it is installed, and take every text as it stands."""
    installed = font_manager.get_font_names()
    rcParams["font.family"] = ["DejaVu Sans", *[font for font in CHINESE_FONTS if font in installed]]
    rcParams["text.parse_math"] = False  # a dollar sign in a caption is a dollar sign


def text_width(text: str) -> float:
    """About how wide a text of the ordinary size is, in inches."""
    return (0.65 * len(text) + 0.6) * FONT_SIZE / 72


def text_colour(background: tuple[float, ...]) -> str:
    """Black or white, whichever reads better on an RGB or RGBA colour."""
    return "black" if np.dot(background[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def place_label(
    box: tuple[float, ...], width: float, height: float, picture: Image.Image, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """
    Left and top edge of a label of this size: at the first corner of the box, or else the first place further down,
    where it covers no other label.

    Args:
        box: x1, y1, x2, y2; all numbers are in pixels of the picture.
        taken: left, top and right edge of the other labels, which are as high.
    """
    x1, y1, x2, y2 = box
    above, below = max(0, y1 - height), min(y2, picture.height - height)
    corners = [(x1, above), (x2 - width, above), (x1, below), (x2 - width, below)]
    further_down = ((x1, above + step * height / 4) for step in itertools.count())
    for left, top in itertools.chain(corners, further_down):
        left = max(0, min(left, picture.width - width))
        if not any(
            left < other_right and left + width > other_left and abs(top - other_top) < height
            for other_left, other_top, other_right in taken
        ):
            return left, top


def draw_boxes(
    ax: Axes, picture: Image.Image, boxes: np.ndarray, colours: Sequence[tuple[float, ...]], labels: Sequence[str]
):
    """
    Draws a picture, and boxes with labels.

    Args:
        ax: With the proportions of the picture.
        boxes: float `(n, 4)`, x1, y1, x2, y2 in pixels of the picture. The first one is drawn on top.
        colours: RGBA in [0, 1], one for each box.
        labels: a short text for each box.
    """
    ax.imshow(picture, extent=(0, picture.width, picture.height, 0))
    ax.set(xlim=(0, picture.width), ylim=(picture.height, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    inch = picture.width / (ax.get_position().width * ax.figure.get_figwidth())  # in pixels of the picture
    height = 1.5 * FONT_SIZE / 72 * inch
    taken = []
    for box, colour, label in zip(boxes.tolist(), colours, labels, strict=True):
        x1, y1, x2, y2 = box
        order = 2 - len(taken) / len(boxes)
        outline = {"fill": False, "edgecolor": colour, "linewidth": 2, "zorder": order, "clip_on": False}
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **outline))
        width = text_width(label) * inch
        left, top = place_label(box, width, height, picture, taken)
        taken.append((left, top, left + width))
        ax.text(
            left + LABEL_PADDING * FONT_SIZE / 72 * inch,
            top + height / 2,
            label,
            color=text_colour(colour),
            fontsize=FONT_SIZE,
            verticalalignment="center_baseline",
            bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": f"square,pad={LABEL_PADDING}"},
        )
