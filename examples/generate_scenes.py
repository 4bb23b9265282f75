"""Generates *scenes*, a region dataset that needs no download: pictures of coloured shapes with boxes, classes, region
features, English and Chinese captions, questions with answers and four-way choices.

    python examples/generate_scenes.py outputs/scenes --num_train 6000 --num_validation 500 --num_test 500 --seed 0
    python examples/generate_scenes.py outputs/scenes_tiny --num_train 50 --num_validation 20 --num_test 20 --overwrite

The first caption of a scene names two objects and their relation, or three objects. Every unordered pair of kinds (a
kind is a colour and a shape) belongs to exactly one split: a training scene holds no pair of the other two splits, the
first caption of a validation or test scene names a pair of its own split, and within these two splits it is true of
this scene only. The same arguments give the same bytes.
"""

import argparse
import functools
import hashlib
import io
import itertools
import math
import random
import re
import shutil
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from tqdm.auto import tqdm
from transformers import BertTokenizer

IMAGE_SIZE = 128  # pixels, both sides
CROP_SIZE = 12
CROP_MARGIN = 2.0  # pixels around a box that its crop also shows
COLOUR_LEVELS = 4  # per channel, of the colour histogram
REGION_FEATURE_SIZE = CROP_SIZE**2 + COLOUR_LEVELS**3
SPLITS = ("train", "validation", "test")
ROWS_PER_GROUP = 200
ROWS_PER_FILE = 3000

COLOURS = {  # name: (red, green, blue), Chinese
    "red": ((215, 40, 40), "红色"),
    "orange": ((240, 135, 25), "橙色"),
    "yellow": ((245, 225, 50), "黄色"),
    "green": ((40, 165, 60), "绿色"),
    "blue": ((40, 80, 220), "蓝色"),
    "purple": ((145, 50, 175), "紫色"),
    "black": ((20, 20, 20), "黑色"),
    "white": ((240, 240, 240), "白色"),
}
SHAPES = {  # name: plural, Chinese
    "circle": ("circles", "圆形"),
    "square": ("squares", "正方形"),
    "triangle": ("triangles", "三角形"),
    "star": ("stars", "五角星"),
    "cross": ("crosses", "十字"),
    "ring": ("rings", "圆环"),
}
SIZES = {"small": ((8.0, 10.0), "小"), "large": ((15.0, 19.0), "大")}  # name: range of the radius in pixels, Chinese
RELATIONS = {  # name: English, Chinese
    "left": ("to the left of", "左边"),
    "right": ("to the right of", "右边"),
    "above": ("above", "上面"),
    "below": ("below", "下面"),
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
NUMBERS_ZH = ["零", "一", "两", "三", "四", "五", "六"]
CAPTION_TEMPLATES = {  # form: (English, Chinese) pairs that say the same
    "relation": [
        ("{a} is {relation} {b}", "{a}在{b}的{relation}"),
        ("there is {a} {relation} {b}", "图中有{a}，它在{b}的{relation}"),
        ("{relation} {b} there is {a}", "{b}的{relation}有{a}"),
    ],
    "together": [
        ("{objects}", "{objects}"),
        ("a picture of {objects}", "一张有{objects}的图片"),
        ("the picture shows {objects}", "图中有{objects}"),
    ],
    "object": [
        ("there is {a} in the picture", "图中有{a}"),
        ("one of the objects is {a}", "这些物体中有{a}"),
    ],
    "count": [
        ("{count} of the {total} objects {value}", "{total}个物体中有{count}个是{value}"),
        ("there are {total} objects and {count} of them {value}", "图中有{total}个物体，其中{count}个是{value}"),
    ],
}
# Words of captions, questions and choices that stand in no table above.
OTHER_WORDS = "a an and are colour how in is many no object objects of picture relative shape the there these to what"
OTHER_WORDS += " where which yes 一个 和 的 、"

COLOUR_NAMES, SHAPE_NAMES = list(COLOURS), list(SHAPES)
KINDS = list(itertools.product(COLOUR_NAMES, SHAPE_NAMES))  # a class id is an index into this list
CLASS_NAMES = [f"{colour} {shape}" for colour, shape in KINDS]
DESCRIPTIONS = list(itertools.product(SIZES, COLOURS, SHAPES))
CLASS_IDS = {kind: class_id for class_id, kind in enumerate(KINDS)}

Kind = tuple[str, str]  # colour, shape
Description = tuple[str, str, str]  # size, colour, shape


@dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y` (the centre) and `radius` are in pixels, `angle` in radians, `rgb` in 0..255."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape

    @property
    def description(self) -> Description:
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """A picture's content: `objects` in drawing order, `captioned` = positions of the objects that the first caption
    names (two or three), `background` = RGB in 0..255."""

    image_id: str
    objects: tuple[SceneObject, ...]
    captioned: tuple[int, ...]
    background: tuple[int, int, int]


# ---------------------------------------------------------------- content and its split


@functools.cache
def split_of_pair(first: Kind, second: Kind) -> str:
    """The only split that may caption this unordered pair of kinds: about 70 % train, 15 % validation, 15 % test."""
    value = zlib.crc32(" | ".join(sorted((" ".join(first), " ".join(second)))).encode()) % 100
    return "train" if value < 70 else "validation" if value < 85 else "test"


@functools.cache
def pairs_of_split(split: str) -> list[tuple[Kind, Kind]]:
    """All unordered pairs of two different kinds that belong to `split`."""
    return [pair for pair in itertools.combinations(KINDS, 2) if split_of_pair(*pair) == split]


@functools.cache
def compatible_kinds(split: str, kind: Kind) -> frozenset[Kind]:
    """The kinds that may stand beside `kind` in a scene of `split`: the pair is a training pair or the split's own."""
    return frozenset(other for other in KINDS if split_of_pair(kind, other) in ("train", split))


def sample_scene(rng: random.Random, split: str, image_id: str, pair: tuple[Kind, Kind]) -> Scene:
    """Samples a scene of 3 to 6 objects, no two alike in size, colour and shape, whose caption names the kinds `pair`
    (and in half of the scenes a third object); the other objects are distractors."""
    objects = None
    while objects is None or clear_relation(*objects[:2]) is None:
        kinds = list(pair)
        for _ in range(rng.randint(1, 4)):
            candidates = sorted(frozenset.intersection(*(compatible_kinds(split, kind) for kind in kinds)))
            if rng.random() < 0.4:  # A distractor that shares its colour or shape with an object is harder.
                colour, shape = rng.choice(kinds)
                candidates = [kind for kind in candidates if kind[0] == colour or kind[1] == shape] or candidates
            if candidates:
                kinds.append(rng.choice(candidates))
        objects = place_objects(rng, kinds) if len(kinds) >= 3 else None
    captioned = rng.choice([(0, 1), (0, 1, 2)])
    order = rng.sample(range(len(objects)), len(objects))  # An object's position must not tell that it is captioned.
    grey = rng.randint(105, 165)
    background = tuple(grey + rng.randint(-8, 8) for _ in range(3))
    objects = tuple(objects[position] for position in order)
    return Scene(image_id, objects, tuple(order.index(position) for position in captioned), background)


def place_objects(rng: random.Random, kinds: list[Kind]) -> list[SceneObject] | None:
    """Gives each kind a size, place, angle and shade such that objects overlap little; None if that cannot be."""
    objects = []
    for colour, shape in kinds:
        sizes = [size for size in SIZES if (size, colour, shape) not in {item.description for item in objects}]
        if not sizes:
            return None
        size = rng.choice(sizes)
        radius = rng.uniform(*SIZES[size][0])
        for _ in range(50):
            x, y = (rng.uniform(radius + 2, IMAGE_SIZE - radius - 2) for _ in range(2))
            if all(math.hypot(x - other.x, y - other.y) > 0.85 * (radius + other.radius) for other in objects):
                break
        else:
            return None
        rgb = tuple(min(max(value + rng.randint(-15, 15), 0), 255) for value in COLOURS[colour][0])
        objects.append(SceneObject(shape, colour, size, x, y, radius, rng.uniform(-0.3, 0.3), rgb))
    return objects


# ---------------------------------------------------------------- truth


def clear_relation(first: SceneObject, second: SceneObject) -> str | None:
    """How `first` lies to `second` ("left", "right", "above", "below"), or None where people could disagree."""
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < 16 or max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def possible_relation(relation: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether anyone could say that `first` stands in `relation` to `second`: lenient, so that False is certain."""
    dx, dy = first.x - second.x, first.y - second.y
    return {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation] < 4


def first_caption_statement(scene: Scene) -> tuple:
    """What the first caption of `scene` says, in a form that can be looked up in `true_statements`."""
    objects = [scene.objects[position] for position in scene.captioned]
    if len(objects) == 3:
        return "together", *sorted(item.description for item in objects)
    relation = clear_relation(*objects)
    if relation in ("right", "below"):  # "a right of b" is the statement "b left of a".
        relation = {"right": "left", "below": "above"}[relation]
        objects.reverse()
    return relation, *(item.description for item in objects)


def true_statements(scene: Scene) -> set[tuple]:
    """Everything that a first caption could say and that is, read leniently, true of `scene`."""
    statements = set()
    for first, second in itertools.permutations(scene.objects, 2):
        for relation in ("left", "above"):
            if possible_relation(relation, first, second):
                statements.add((relation, first.description, second.description))
    for group in itertools.combinations(sorted(item.description for item in scene.objects), 3):
        statements.add(("together", *group))
    return statements


def generate_split(split: str, num_scenes: int, seed: int) -> Iterator[Scene]:
    """Yields the scenes of a split; in validation and test, no first caption is true of another scene of the split."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    pairs = list(pairs_of_split(split))
    random.Random(f"{seed} {split}").shuffle(pairs)
    said, true_of_a_scene = set(), set()
    for index in range(num_scenes):
        # A generator per scene: the number of scenes does not change those before.
        rng = random.Random(f"{seed} {split} {index}")
        for _ in range(200):
            pair = pairs[index % len(pairs)]
            scene = sample_scene(rng, split, f"{split}-{index:06d}", tuple(rng.sample(pair, 2)))
            if split == "train":
                break
            statement, statements = first_caption_statement(scene), true_statements(scene)
            if statement not in true_of_a_scene and not statements & said:
                said.add(statement)
                true_of_a_scene |= statements
                break
        else:
            raise ValueError(f"{split}: expected fewer scenes, got {num_scenes}: no unused first caption after {index}")
        yield scene


# ---------------------------------------------------------------- pictures, boxes, features


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """The corners (x, y) in pixels of a polygon shape; for circle and ring the corners of the bounding box."""
    if item.shape in ("circle", "ring"):
        return [(item.x + sign * item.radius, item.y + sign * item.radius) for sign in (-1, 1)]
    if item.shape == "cross":
        points = [(0.31, -0.93), (0.31, -0.31), (0.93, -0.31), (0.93, 0.31), (0.31, 0.31), (0.31, 0.93)]
        points += [(-x, -y) for x, y in points]
    elif item.shape == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    else:
        lengths = [1, 1, 1] if item.shape == "triangle" else [1, 0.42] * 5
        angles = [2 * math.pi * corner / len(lengths) for corner in range(len(lengths))]
        points = [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(lengths, angles, strict=True)]
    cosine, sine = item.radius * math.cos(item.angle), item.radius * math.sin(item.angle)
    return [(item.x + x * cosine - y * sine, item.y + x * sine + y * cosine) for x, y in points]


def draw_scene(scene: Scene) -> PILImage.Image:
    """Draws an RGB picture of 128 x 128 pixels."""
    scale = 2  # Drawn twice as large and reduced, for smooth edges.
    image = PILImage.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        points = [(scale * x, scale * y) for x, y in outline(item)]
        if item.shape == "circle":
            draw.ellipse(points, fill=item.rgb)
        elif item.shape == "ring":
            draw.ellipse(points, outline=item.rgb, width=round(0.38 * item.radius * scale))
        else:
            draw.polygon(points, fill=item.rgb)
    return image.reduce(scale)


def detect_objects(scene: Scene, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """What a detector would report: boxes float32 (n, 4), x1, y1, x2, y2 in pixels, up to 1 pixel off; scores float32
    (n,): the fraction of the box that no later object's box covers, lowered by up to 10 %."""
    corners = np.array([np.concatenate([np.min(p, axis=0), np.max(p, axis=0)]) for p in map(outline, scene.objects)])
    scores = []
    for position, box in enumerate(corners):
        later = corners[position + 1 :]
        overlaps = np.clip(np.minimum(later[:, 2:], box[2:]) - np.maximum(later[:, :2], box[:2]), 0, None)
        covered = overlaps.prod(axis=1).sum() / (box[2:] - box[:2]).prod()
        scores.append(max(1 - covered, 0.05) * rng.uniform(0.9, 1.0))
    jitter = np.array([rng.uniform(-1, 1) for _ in range(corners.size)]).reshape(corners.shape)
    return np.clip(corners + jitter, 0, IMAGE_SIZE).astype(np.float32), np.array(scores, dtype=np.float32)


def region_features(image: PILImage.Image, boxes: np.ndarray) -> np.ndarray:
    """Region features from the pixels of each box: its silhouette and its colours, as a detector's features tell shape
    and colour apart.

    Args:
        image: RGB picture.
        boxes: float (n, 4), x1, y1, x2, y2 in pixels.

    Returns:
        float16 (n, 208). Each box with a margin of 2 pixels is resized to 12 x 12 pixels. The first 144 numbers say how
        much each pixel differs from the crop's border, from -1 (not at all) to 1 (by 64 of 255 or more); the other 64
        are 4 times the square roots of the shares that the 4 x 4 x 4 levels of red, green and blue have of the pixels
        that differ.
    """
    margin = np.array([-CROP_MARGIN, -CROP_MARGIN, CROP_MARGIN, CROP_MARGIN])
    crops = np.clip(boxes + margin, 0, [image.width, image.height] * 2).tolist()
    size = (CROP_SIZE, CROP_SIZE)
    pixels = np.stack([np.asarray(image.resize(size, PILImage.Resampling.BILINEAR, box=crop)) for crop in crops])
    pixels = pixels.astype(np.int64)
    edges = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    background = np.median(np.concatenate(edges, axis=1), axis=1)[:, None, None]  # (n, 1, 1, 3)
    difference = np.clip(np.abs(pixels - background).max(axis=-1) / 64, 0, 1).reshape(len(crops), -1)  # (n, 144)

    levels = pixels.reshape(len(crops), -1, 3) * COLOUR_LEVELS // 256
    bins = levels @ np.array([COLOUR_LEVELS**2, COLOUR_LEVELS, 1])  # (n, 144)
    shares = np.zeros((len(crops), COLOUR_LEVELS**3))
    np.add.at(shares, (np.arange(len(crops))[:, None], bins), difference)
    shares /= np.maximum(difference.sum(axis=1, keepdims=True), 1e-6)
    return np.concatenate([2 * difference - 1, 4 * np.sqrt(shares)], axis=1).astype(np.float16)


# ---------------------------------------------------------------- text


def describe(description: Description | tuple[None, str, str], article: str = "a") -> str:
    """("large", "red", "circle") -> "a large red circle"; the size may be None; `article` is "a" or "the"."""
    words = " ".join(word for word in description if word)
    return f"an {words}" if article == "a" and words.startswith("o") else f"{article} {words}"


def describe_zh(description: Description | tuple[None, str, str], article: str = "一个") -> str:
    """("large", "red", "circle") -> "一个红色大圆形"; the size may be None."""
    size, colour, shape = description
    return f"{article}{COLOURS[colour][1]}{SIZES[size][1] if size else ''}{SHAPES[shape][1]}"


def relation_caption(rng: random.Random, relation: str, first: Description, second: Description) -> tuple[str, str]:
    english, chinese = rng.choice(CAPTION_TEMPLATES["relation"])
    return (
        english.format(a=describe(first), b=describe(second), relation=RELATIONS[relation][0]),
        chinese.format(a=describe_zh(first), b=describe_zh(second), relation=RELATIONS[relation][1]),
    )


def together_caption(rng: random.Random, descriptions: list[Description]) -> tuple[str, str]:
    english, chinese = rng.choice(CAPTION_TEMPLATES["together"])
    words = [describe(description) for description in descriptions]
    words_zh = [describe_zh(description, article="") for description in descriptions]
    return (
        english.format(objects=", ".join(words[:-1]) + " and " + words[-1]),
        chinese.format(objects="、".join(words_zh[:-1]) + "和" + words_zh[-1]),
    )


def count_caption(rng: random.Random, scene: Scene) -> tuple[str, str]:
    total = len(scene.objects)
    counts = count_colours_and_shapes(scene)
    value = rng.choice([value for value, count in counts.items() if count < total])
    count = counts[value]
    verb = "is" if count == 1 else "are"
    if value in COLOURS:
        predicate, predicate_zh = f"{verb} {value}", COLOURS[value][1] + "的"
    else:
        predicate = f"{verb} {describe((None, value)) if count == 1 else SHAPES[value][0]}"
        predicate_zh = SHAPES[value][1]
    english, chinese = rng.choice(CAPTION_TEMPLATES["count"])
    return (
        english.format(count=NUMBERS[count], total=NUMBERS[total], value=predicate),
        chinese.format(count=NUMBERS_ZH[count], total=NUMBERS_ZH[total], value=predicate_zh),
    )


def count_colours_and_shapes(scene: Scene) -> dict[str, int]:
    values = [value for item in scene.objects for value in item.kind]
    return {value: values.count(value) for value in COLOUR_NAMES + SHAPE_NAMES if value in values}


def captions_of_scene(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Five captions, each in English and in Chinese: the most specific one (two objects with sizes and their relation,
    or three objects), a relation without sizes, one object, a count, and all objects but one (at most four)."""
    captioned = [scene.objects[position] for position in scene.captioned]
    descriptions = [item.description for item in captioned]
    if len(captioned) == 2:
        first_caption = relation_caption(rng, clear_relation(*captioned), *descriptions)
    else:
        first_caption = together_caption(rng, rng.sample(descriptions, 3))

    pairs = [pair for pair in itertools.permutations(scene.objects, 2) if clear_relation(*pair) is not None]
    first, second = rng.choice([pair for pair in pairs if pair[0].kind != pair[1].kind])
    second_caption = relation_caption(rng, clear_relation(first, second), (None, *first.kind), (None, *second.kind))

    template, template_zh = rng.choice(CAPTION_TEMPLATES["object"])
    item = rng.choice(scene.objects).description
    object_caption = template.format(a=describe(item)), template_zh.format(a=describe_zh(item))
    most = rng.sample([item.description for item in scene.objects], min(len(scene.objects) - 1, 4))
    return [first_caption, second_caption, object_caption, count_caption(rng, scene), together_caption(rng, most)]


def reference(scene: Scene, item: SceneObject, hidden: str | None = None) -> str | None:
    """The shortest phrase with "the" that fits `item` alone and does not tell its `hidden` attribute ("colour", "shape"
    or None); None where there is no such phrase."""
    colour = None if hidden == "colour" else item.colour
    shape = None if hidden == "shape" else item.shape
    for size in (None, item.size):
        wanted = [(value, index) for index, value in enumerate((size, colour, shape)) if value is not None]
        if sum(all(other.description[index] == value for value, index in wanted) for other in scene.objects) == 1:
            return describe((size, colour, shape or "object"), article="the")
    return None


def questions_of_scene(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """Questions with one-word answers, at most one of each type: colour, shape, where, count, yes-no."""
    questions = []

    def ask(kind_of_question: str, question: str, answer: str) -> None:
        questions.append({"question": question, "answer": answer, "type": kind_of_question})

    objects = rng.sample(scene.objects, len(scene.objects))
    for attribute in ("colour", "shape"):
        for item in objects:
            if phrase := reference(scene, item, hidden=attribute):
                ask(attribute, f"what {attribute} is {phrase}?", getattr(item, attribute))
                break
    for first, second in itertools.permutations(objects, 2):
        if (relation := clear_relation(first, second)) is not None:
            ask("where", f"where is {reference(scene, first)} relative to {reference(scene, second)}?", relation)
            break
    counts = count_colours_and_shapes(scene)
    value = rng.choice([None, *rng.sample(list(counts), min(len(counts), 4)), rng.choice(COLOUR_NAMES + SHAPE_NAMES)])
    counted = "objects" if value is None else f"{value} objects" if value in COLOURS else SHAPES[value][0]
    answer = len(objects) if value is None else counts.get(value, 0)
    ask("count", f"how many {counted} are there?", str(answer))
    kind, answer = rng.choice(objects).kind, "yes"
    if rng.random() < 0.5:
        present = {item.kind for item in objects}
        kind, answer = rng.choice([k for k in KINDS if k not in present and (k[0] == kind[0] or k[1] == kind[1])]), "no"
    ask("yes-no", f"is there {describe((None, *kind))}?", answer)
    return questions


def choices_of_scene(scene: Scene, rng: random.Random) -> list[dict]:
    """Two questions (what is there, what is where), each with one true and three false but plausible choices."""
    present = [item.description for item in scene.objects]
    items = [("which of these is in the picture?", rng.choice(present), present)]
    pairs = [pair for pair in itertools.permutations(scene.objects, 2) if clear_relation(*pair) is not None]
    first, second = rng.choice(pairs)
    relation = clear_relation(first, second)
    possible = [other.description for other in scene.objects if possible_relation(relation, other, second)]
    items.append((f"what is {RELATIONS[relation][0]} {reference(scene, second)}?", first.description, possible))
    present_values = {value for description in present for value in description}
    others = rng.sample(DESCRIPTIONS, len(DESCRIPTIONS))
    others.sort(key=lambda other: sum(value not in present_values for value in other))  # Plausible ones first.
    result = []
    for question, right, true in items:
        # All four mixtures of two descriptions: what the choices share does not tell which one is right.
        for other in others:
            choices = list(dict.fromkeys(itertools.product(*zip(right, other, strict=True))))
            if len(choices) == 4 and not any(choice in true for choice in choices if choice != right):
                break
        rng.shuffle(choices)
        texts = [describe(choice) for choice in choices]
        result.append({"question": question, "choices": texts, "answer_index": choices.index(right)})
    return result


def scene_to_row(scene: Scene, seed: int) -> dict:
    """One row of the region dataset (numpy arrays for the numbers; `image` is a PNG's bytes)."""
    rng = random.Random(f"{seed} {scene.image_id} row")
    image = draw_scene(scene)
    png = io.BytesIO()
    image.save(png, format="PNG")
    boxes, scores = detect_objects(scene, rng)
    captions = captions_of_scene(scene, rng)
    return {
        "image_id": scene.image_id,
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "boxes": boxes,
        "features": region_features(image, boxes),
        "class_ids": np.array([CLASS_IDS[item.kind] for item in scene.objects], dtype=np.int32),
        "class_scores": scores,
        "captions": [english for english, _ in captions],
        "captions_zh": [chinese for _, chinese in captions],
        "questions": questions_of_scene(scene, rng),
        "choices": choices_of_scene(scene, rng),
        "image": {"bytes": png.getvalue(), "path": f"{scene.image_id}.png"},
    }


# ---------------------------------------------------------------- files

FEATURES = Features(
    {
        "image_id": Value("string"),
        "width": Value("int32"),
        "height": Value("int32"),
        "boxes": List(List(Value("float32"), length=4)),
        "features": List(List(Value("float16"), length=REGION_FEATURE_SIZE)),
        "class_ids": List(Value("int32")),
        "class_scores": List(Value("float32")),
        "captions": List(Value("string")),
        "captions_zh": List(Value("string")),
        "questions": List({"question": Value("string"), "answer": Value("string"), "type": Value("string")}),
        "choices": List(
            {"question": Value("string"), "choices": List(Value("string")), "answer_index": Value("int32")}
        ),
        "image": Image(),
    }
)

CARD = """---
pretty_name: Scenes
language:
- en
- zh
task_categories:
- visual-question-answering
- image-to-text
tags:
- synthetic
configs:
- config_name: default
  description: 'sha256 of the data files: {digest}'
  data_files:
{data_files}
---

# Scenes

Synthetic pictures of 3 to 6 coloured shapes (8 colours, 6 shapes, 2 sizes; 128 x 128 pixels), with one region per
object: box, class (`objects_vocab.txt`), score and a {feature_size}-d feature of the box's pixels: its silhouette and
its colours.
Each scene has 5 captions in English (`captions`) and the same 5 in Chinese (`captions_zh`), questions with answers
(`questions`) and four-way choices (`choices`). `tokenizer/` holds a WordPiece tokenizer of their words.

| split | scenes |
|---|---|
{sizes}

Every unordered pair of kinds (colour and shape) belongs to one split. A training scene holds no pair of validation or
test; the first caption of a validation or test scene names a pair of its split and is true of no other scene there.

Made with `python examples/generate_scenes.py OUTPUT_DIR {arguments}`.
The scenes are for testing and teaching: they say nothing about photographs.
"""


def rows_to_table(rows: list[dict]) -> pa.Table:
    schema = FEATURES.arrow_schema
    offsets = pa.array(np.cumsum([0] + [len(row["boxes"]) for row in rows]), type=pa.int32())
    columns = {name: [row[name] for row in rows] for name in schema.names}
    for name in ("boxes", "features", "class_ids", "class_scores"):
        stacked = np.concatenate(columns[name])
        values = pa.array(stacked.reshape(-1))
        if stacked.ndim == 2:
            values = pa.FixedSizeListArray.from_arrays(values, stacked.shape[1])
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(columns, schema=schema)


def vocabulary() -> list[str]:
    """[PAD] [UNK] [CLS] [SEP] [MASK], then, sorted: the grammar's words and Chinese characters, and all ASCII letters,
    digits and punctuation with their ## pieces, so that no ASCII word becomes [UNK]."""
    text = [OTHER_WORDS, *NUMBERS, *NUMBERS_ZH, *COLOURS, *SHAPES, *SIZES, *RELATIONS]
    text += [chinese for _, chinese in (*COLOURS.values(), *SIZES.values())]
    text += [phrase for phrases in (*SHAPES.values(), *RELATIONS.values()) for phrase in phrases]
    for templates in CAPTION_TEMPLATES.values():
        text += [re.sub(r"\{\w+\}", " ", template) for pair in templates for template in pair]
    words = set(re.findall(r"[a-z]+|[^a-z\s]", " ".join(text)))
    letters = string.ascii_lowercase + string.digits
    words.update(letters, string.punctuation, ("##" + letter for letter in letters))
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]


def build_tokenizer() -> BertTokenizer:
    """A lower-casing BERT WordPiece tokenizer of `vocabulary()`."""
    vocab = {token: token_id for token_id, token in enumerate(vocabulary())}
    return BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=512)


def write_scenes(
    output_dir: str | Path, num_train: int, num_validation: int, num_test: int, seed: int = 0, overwrite: bool = False
) -> None:
    """Writes the dataset's folder: README.md, objects_vocab.txt, data/SPLIT-00000-of-0000N.parquet and tokenizer/.

    Raises:
        ValueError: if a number of scenes is not positive, or too large for captions that are true of one scene only.
        FileExistsError: if `output_dir` is not empty and `overwrite` is not given, or it is not a folder of scenes.
    """
    output_dir = Path(output_dir).resolve()
    sizes = dict(zip(SPLITS, (num_train, num_validation, num_test), strict=True))
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(f"num_{split}: expected at least 1 scene, got {size}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        if not overwrite:
            raise FileExistsError(f"output_dir: expected a new or empty folder, got {output_dir} (see --overwrite)")
        if not (output_dir / "objects_vocab.txt").is_file() or not (output_dir / "data").is_dir():
            raise FileExistsError(f"output_dir: expected a folder of scenes to overwrite, got {output_dir}")

    # A finished folder takes its name in one step, so that a folder of this name is always complete.
    temporary_dir = output_dir.with_name(f".{output_dir.name}.incomplete")
    former_dir = output_dir.with_name(f".{output_dir.name}.former")
    for folder in (temporary_dir, former_dir):  # of a run that was stopped
        shutil.rmtree(folder, ignore_errors=True)
    (temporary_dir / "data").mkdir(parents=True)
    with tqdm(total=sum(sizes.values()), unit="scene") as progress_bar:
        for split, size in sizes.items():
            progress_bar.set_description(split)
            scenes = generate_split(split, size, seed)
            num_files = math.ceil(size / ROWS_PER_FILE)
            for file_index in range(num_files):
                path = temporary_dir / "data" / f"{split}-{file_index:05d}-of-{num_files:05d}.parquet"
                # Dictionaries of float vectors would be read at a third of the speed.
                with pq.ParquetWriter(path, FEATURES.arrow_schema, use_dictionary=False) as writer:
                    scenes_of_file = itertools.islice(scenes, ROWS_PER_FILE)
                    while group := list(itertools.islice(scenes_of_file, ROWS_PER_GROUP)):
                        writer.write_table(rows_to_table([scene_to_row(scene, seed) for scene in group]))
                        progress_bar.update(len(group))
    (temporary_dir / "objects_vocab.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    build_tokenizer().save_pretrained(temporary_dir / "tokenizer")
    # `datasets` caches a local folder by its card, not by its files: the card must change when the files do.
    digest = hashlib.sha256()
    for path in sorted((temporary_dir / "data").iterdir()):
        digest.update(path.read_bytes())
    (temporary_dir / "README.md").write_text(
        CARD.format(
            digest=digest.hexdigest(),
            data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in SPLITS),
            feature_size=REGION_FEATURE_SIZE,
            sizes="\n".join(f"| {split} | {size:,} |" for split, size in sizes.items()),
            arguments=" ".join(f"--num_{split} {size}" for split, size in sizes.items()) + f" --seed {seed}",
        ),
        encoding="utf-8",
    )
    if output_dir.exists():
        output_dir.rename(former_dir)
    temporary_dir.rename(output_dir)
    shutil.rmtree(former_dir, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="Folder that is written.")
    parser.add_argument("--num_train", type=int, default=6000, help="Number of training scenes.")
    parser.add_argument("--num_validation", type=int, default=500, help="Number of validation scenes.")
    parser.add_argument("--num_test", type=int, default=500, help="Number of test scenes.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed gives the same bytes.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing folder of scenes.")
    args = parser.parse_args()
    try:
        write_scenes(**vars(args))
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main()
