import io
import random
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image
from transformers import AutoTokenizer

import generate_scenes
from generate_scenes import (
    CLASS_NAMES,
    KINDS,
    Scene,
    SceneObject,
    captions_of_scene,
    clear_relation,
    count_caption,
    describe,
    detect_objects,
    draw_scene,
    generate_split,
    pairs_of_split,
    possible_relation,
    region_features,
    split_of_pair,
    true_statements,
    write_scenes,
)

SIZES = {"num_train": 70, "num_validation": 40, "num_test": 30}
COLOURS = "red orange yellow green blue purple black white".split()
COLOURS_ZH = dict(zip("红色 橙色 黄色 绿色 蓝色 紫色 黑色 白色".split(), COLOURS, strict=True))
SHAPES = "circle square triangle star cross ring".split()
SHAPES_ZH = dict(zip("圆形 正方形 三角形 五角星 十字 圆环".split(), SHAPES, strict=True))
DESCRIPTION = re.compile(rf"(?:\b(large|small) )?\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
DESCRIPTION_ZH = re.compile(f"({'|'.join(COLOURS_ZH)})(大|小)?({'|'.join(SHAPES_ZH)})")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
NUMBERS_ZH = "零一两三四五六"


@pytest.fixture(scope="module")
def scenes_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(path, **SIZES, seed=3)
    return path


@pytest.fixture(scope="module")
def splits(scenes_dir):
    paths = {split: sorted((scenes_dir / "data").glob(f"{split}-*")) for split in ("train", "validation", "test")}
    return {split: [row for path in files for row in pq.read_table(path).to_pylist()] for split, files in paths.items()}


def scene_object(**changes):
    values = dict(shape="circle", colour="red", size="large", x=64.0, y=64.0, radius=16.0, angle=0.0, rgb=(255, 0, 0))
    return SceneObject(**(values | changes))


# A reader of captions that shares nothing with the generator: what is there comes from the boxes and class ids.


def objects_of_row(row):
    """[(size, colour, shape, centre x, centre y)]; sizes from the boxes: small ones are at most 23 pixels wide."""
    objects = []
    for (x1, y1, x2, y2), class_id in zip(row["boxes"], row["class_ids"], strict=True):
        size = "large" if max(x2 - x1, y2 - y1) > 23.2 else "small"
        objects.append((size, *CLASS_NAMES[class_id].split(), (x1 + x2) / 2, (y1 + y2) / 2))
    return objects


def fits(description, item):
    return all(wanted is None or wanted == value for wanted, value in zip(description, item[:3], strict=True))


def parse(text):
    return [(size or None, colour, shape) for size, colour, shape in DESCRIPTION.findall(text)]


def parse_zh(text):
    found = DESCRIPTION_ZH.findall(text)
    size_names = {"大": "large", "小": "small", "": None}
    return [(size_names[size], COLOURS_ZH[colour], SHAPES_ZH[shape]) for colour, size, shape in found]


def parse_relation(text):
    relation = re.search("left|right|above|below", text)
    if relation is None:
        return None
    first, second = parse(text)
    if re.match("to the|above|below", text):
        first, second = second, first
    return relation.group(), first, second


def parse_relation_zh(text):
    relation = re.search("左边|右边|上面|下面", text)
    if relation is None:
        return None
    first, second = parse_zh(text)
    if re.search("(左边|右边|上面|下面)有", text):
        first, second = second, first
    return {"左边": "left", "右边": "right", "上面": "above", "下面": "below"}[relation.group()], first, second


def is_true(text, objects):
    if relation := parse_relation(text):
        name, first, second = relation
        for a in objects:
            for b in objects:
                distance = {"left": b[3] - a[3], "right": a[3] - b[3], "above": b[4] - a[4], "below": a[4] - b[4]}[name]
                if a != b and fits(first, a) and fits(second, b) and distance > 0:
                    return True
        return False
    descriptions = parse(text)
    return len(set(descriptions)) == len(descriptions) and all(
        any(fits(description, item) for item in objects) for description in descriptions
    )


def test_files_and_schema(scenes_dir, splits):
    assert sorted(path.name for path in scenes_dir.iterdir()) == ["README.md", "data", "objects_vocab.txt", "tokenizer"]
    assert sorted(path.name for path in (scenes_dir / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 70, "validation": 40, "test": 30}
    schema = pq.read_schema(scenes_dir / "data" / "train-00000-of-00001.parquet")
    types = {field.name: str(field.type).replace("element", "item") for field in schema}
    struct = "list<item: struct<question: string, {}>>"
    assert types == {
        "image_id": "string",
        "width": "int32",
        "height": "int32",
        "boxes": "list<item: fixed_size_list<item: float>[4]>",
        "features": "list<item: fixed_size_list<item: halffloat>[208]>",
        "class_ids": "list<item: int32>",
        "class_scores": "list<item: float>",
        "captions": "list<item: string>",
        "captions_zh": "list<item: string>",
        "questions": struct.format("answer: string, type: string"),
        "choices": struct.format("choices: list<item: string>, answer_index: int32"),
        "image": "struct<bytes: binary, path: string>",
    }
    assert (scenes_dir / "objects_vocab.txt").read_text().split("\n")[:2] == ["red circle", "red square"]
    assert len(CLASS_NAMES) == 48


def test_files_and_row_groups_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_scenes, "ROWS_PER_FILE", 5)
    monkeypatch.setattr(generate_scenes, "ROWS_PER_GROUP", 2)
    write_scenes(tmp_path / "scenes", 8, 1, 1)
    files = [pq.ParquetFile(tmp_path / "scenes" / "data" / f"train-0000{i}-of-00002.parquet") for i in range(2)]
    groups = [[file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] for file in files]
    assert groups == [[2, 2, 1], [2, 1]]
    image_ids = [name for file in files for name in file.read(["image_id"])["image_id"].to_pylist()]
    assert image_ids == [f"train-{index:06d}" for index in range(8)]


def test_datasets_reads_the_folder_and_sees_that_it_was_replaced(tmp_path):
    first_captions = []
    for seed in (0, 1):
        write_scenes(tmp_path / "scenes", 3, 2, 2, seed=seed, overwrite=True)
        assert not list(tmp_path.glob(".scenes*"))
        dataset = load_dataset(str(tmp_path / "scenes"), cache_dir=str(tmp_path / "cache"))
        assert {split: len(rows) for split, rows in dataset.items()} == {"train": 3, "validation": 2, "test": 2}
        assert dataset["train"][0]["image"].size == (128, 128)
        first_captions.append(dataset["test"][0]["captions"][0])
    assert first_captions[0] != first_captions[1]


def test_the_same_seed_gives_the_same_bytes(scenes_dir, tmp_path):
    write_scenes(tmp_path / "again", **SIZES, seed=3)
    names = sorted(path.relative_to(scenes_dir) for path in scenes_dir.rglob("*") if path.is_file())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (scenes_dir / name).read_bytes(), name


def test_more_scenes_do_not_change_the_first_ones():
    assert list(generate_split("test", 4, seed=5)) == list(generate_split("test", 9, seed=5))[:4]
    assert list(generate_split("test", 4, seed=5)) != list(generate_split("test", 4, seed=6))


def test_split_of_pair():
    # crc32 modulo 100 of "blue star | red circle": 49, "red circle | red triangle": 79, "blue ring | red circle": 97.
    assert split_of_pair(("red", "circle"), ("blue", "star")) == "train"
    assert split_of_pair(("red", "circle"), ("red", "triangle")) == "validation"
    assert split_of_pair(("red", "circle"), ("blue", "ring")) == "test"
    for first in KINDS[::5]:
        for second in KINDS[::3]:
            assert split_of_pair(first, second) == split_of_pair(second, first)
    shares = [len(pairs_of_split(split)) / 1128 for split in ("train", "validation", "test")]  # 48 * 47 / 2 pairs
    assert sum(shares) == 1
    assert np.abs(np.array(shares) - [0.70, 0.15, 0.15]).max() < 0.04


def test_splits_are_disjoint_in_content(splits):
    for split, rows in splits.items():
        for row in rows:
            kinds = [tuple(CLASS_NAMES[class_id].split()) for class_id in row["class_ids"]]
            pairs = {split_of_pair(kinds[i], kinds[j]) for i in range(len(kinds)) for j in range(i)}
            assert pairs <= {"train", split}
            captioned = [description[1:] for description in parse(row["captions"][0])]
            captioned_pairs = {split_of_pair(a, b) for i, a in enumerate(captioned) for b in captioned[:i]}
            assert len(captioned) in (2, 3)
            assert split in captioned_pairs


def test_first_captions_are_true_of_one_scene_only(splits):
    for split in ("validation", "test"):
        rows = splits[split]
        for row in rows:
            assert None not in [size for size, _, _ in parse(row["captions"][0])]
            fitting = [other["image_id"] for other in rows if is_true(row["captions"][0], objects_of_row(other))]
            assert fitting == [row["image_id"]]


def test_first_captions_are_true_of_one_scene_only_among_many():
    # Of this many scenes, some captions are true of several if nothing is done about it.
    scenes = list(generate_split("validation", 400, seed=1))
    contents = [[(*item.description, item.x, item.y) for item in scene.objects] for scene in scenes]
    for index, scene in enumerate(scenes):
        caption = captions_of_scene(scene, random.Random(index))[0][0]
        kinds = {description[1:] for description in parse(caption)}
        candidates = [other for other, scene in enumerate(scenes) if kinds <= {item.kind for item in scene.objects}]
        assert [other for other in candidates if is_true(caption, contents[other])] == [index]


def test_captions_are_true(splits):
    for row in [row for rows in splits.values() for row in rows]:
        objects = objects_of_row(row)
        first, relation, one, count, most = row["captions"]
        assert 3 <= len(objects) <= 6
        assert len({item[:3] for item in objects}) == len(objects)
        assert all(is_true(caption, objects) for caption in (first, relation, one, most))
        assert parse_relation(relation) is not None
        assert [len(parse(one)), len(parse(most))] == [1, min(len(objects) - 1, 4)]
        words = [word for word in re.findall(r"[a-z]+", count) if word in NUMBERS]
        total, counted = sorted((NUMBERS.index(word) for word in words), reverse=True)
        value = re.search(r"(?:is|are) (?:an? )?([a-z]+)$", count).group(1)
        singular = {"crosses": "cross"}.get(value, value.removesuffix("s") if value != "cross" else value)
        assert (total, counted) == (len(objects), sum(singular in item[1:3] for item in objects))
        assert counted < total
        assert (" is " in count) == (counted == 1)


def test_counts_are_of_some_objects_not_of_all():
    objects = tuple(scene_object(shape=shape) for shape in ("circle", "ring", "star"))  # all three are red
    captions = {count_caption(random.Random(seed), Scene("red", objects, (0, 1), (0, 0, 0))) for seed in range(40)}
    assert captions == {
        (template.format(f"is a {shape}"), template_zh.format(shape_zh))
        for template, template_zh in [
            ("one of the three objects {}", "三个物体中有一个是{}"),
            ("there are three objects and one of them {}", "图中有三个物体，其中一个是{}"),
        ]
        for shape, shape_zh in [("circle", "圆形"), ("ring", "圆环"), ("star", "五角星")]
    }


def test_chinese_captions_say_the_same(splits):
    for row in [row for rows in splits.values() for row in rows]:
        for index, (english, chinese) in enumerate(zip(row["captions"], row["captions_zh"], strict=True)):
            assert not re.search("[a-z{},]", chinese)
            if index == 3:
                values = COLOURS_ZH | SHAPES_ZH
                value = values[re.search(f"是({'|'.join(values)})的?$", chinese).group(1)]
                assert re.search(rf"\b{value}(s|es)?$", english)
                numbers = [NUMBERS_ZH.index(number) for number in re.findall(r"([一两三四五六])个", chinese)]
                words = [NUMBERS.index(word) for word in re.findall(r"[a-z]+", english) if word in NUMBERS]
                assert sorted(numbers) == sorted(words)
            else:
                assert parse_relation_zh(chinese) == parse_relation(english)
                assert sorted(map(str, parse_zh(chinese))) == sorted(map(str, parse(english)))


def test_questions_have_the_right_answers(splits):
    types = set()
    for row in [row for rows in splits.values() for row in rows]:
        objects = objects_of_row(row)
        for question, answer, question_type in (item.values() for item in row["questions"]):
            types.add(question_type)
            words = re.findall(r"[a-z]+", question)
            if question_type in ("colour", "shape"):
                position = {"colour": 1, "shape": 2}[question_type]
                wanted = [word for word in words[4:] if word != "object"]
                answers = [item[position] for item in objects if all(word in item[:3] for word in wanted)]
                assert answers == [answer]
            elif question_type == "where":
                first, second = parse(question)
                assert [sum(fits(phrase, item) for item in objects) for phrase in (first, second)] == [1, 1]
                a, b = (next(item for item in objects if fits(phrase, item)) for phrase in (first, second))
                dx, dy = a[3] - b[3], a[4] - b[4]
                sides = ("left", "right") if abs(dx) > abs(dy) else ("above", "below")
                assert answer == sides[int(max(dx, dy, key=abs) > 0)]
            elif question_type == "count":
                value = words[2] if words[2] == "objects" else re.sub("(?<!s)s$|(?<=ss)es$", "", words[2])
                assert int(answer) == sum(value == "objects" or value in item[1:3] for item in objects)
            else:
                assert answer == ("yes" if is_true(question, objects) else "no")
    assert types == {"colour", "shape", "where", "count", "yes-no"}


def test_choices_have_one_true_answer(splits):
    for row in [row for rows in splits.values() for row in rows]:
        objects = objects_of_row(row)
        what, where = row["choices"]
        truths = [is_true(choice, objects) for choice in what["choices"]]
        assert (truths.index(True), truths.count(True)) == (what["answer_index"], 1)
        relation = re.fullmatch(r"what is (.*) the (.*)\?", where["question"])
        statements = [f"{choice} is {relation.group(1)} a {relation.group(2)}" for choice in where["choices"]]
        truths = [is_true(statement, objects) for statement in statements]
        assert (truths.index(True), truths.count(True)) == (where["answer_index"], 1)
        for item in row["choices"]:
            # Each value of each attribute is in two or in four of the choices, so text alone does not tell the answer.
            values = [value for choice in item["choices"] for value in parse(choice)[0]]
            assert {values.count(value) for value in values} == {2, 4}


def test_boxes_features_and_scores(splits):
    for row in splits["validation"]:
        boxes = np.array(row["boxes"])
        assert (row["width"], row["height"]) == (128, 128)
        assert boxes.min() >= 0 and boxes.max() <= 128
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 10
        scores = np.array(row["class_scores"])
        assert scores.min() > 0.3 and scores.max() <= 1
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert np.array_equal(region_features(image, boxes), np.array(row["features"], dtype=np.float16))


def test_region_features_of_known_pixels():
    image = Image.new("RGB", (64, 64), (0, 0, 0))
    image.paste((255, 100, 0), (26, 26, 38, 38))
    # With the margin of 2 pixels, the first crop is (20, 20, 44, 44): 2 x 2 pixels become one, and the square of
    # 12 x 12 pixels in its middle 6 x 6. Its colour has the levels 3, 1, 0: bin 3 * 16 + 1 * 4 + 0 = 52.
    features = region_features(image, np.array([[22.0, 22.0, 42.0, 42.0], [2.0, 2.0, 20.0, 20.0]]))
    assert features.shape == (2, 208)
    assert features.dtype == np.float16
    silhouette = features[0, :144].reshape(12, 12)
    assert (silhouette[4:8, 4:8] == 1).all()
    assert (silhouette[[0, 1, 10, 11]] == -1).all() and (silhouette[:, [0, 1, 10, 11]] == -1).all()
    assert features[0, 144:].argmax() == 52
    np.testing.assert_allclose((features[0, 144:].astype(float) ** 2).sum(), 16, rtol=1e-2)  # the shares add up to 1
    # The second crop shows nothing but the background.
    assert (features[1, :144] == -1).all() and (features[1, 144:] == 0).all()


def test_draw_and_detect():
    circle = scene_object()
    square = scene_object(shape="square", colour="blue", rgb=(0, 0, 255), x=84.0)  # covers x 70.4..97.6, y 50.4..77.6
    scene = Scene("one", (circle, square), (0, 1), (100, 110, 120))
    image = draw_scene(scene)
    assert (image.size, image.mode) == ((128, 128), "RGB")
    assert image.getpixel((60, 64)) == (255, 0, 0)
    assert image.getpixel((74, 64)) == (0, 0, 255)
    assert image.getpixel((64, 46)) == (100, 110, 120)
    boxes, scores = detect_objects(scene, random.Random(0))
    np.testing.assert_allclose(boxes, [[48, 48, 80, 80], [70.4, 50.4, 97.6, 77.6]], atol=1.0)
    # The square's box covers 9.6 x 27.2 of the circle's 32 x 32 pixels: 25.5 %; detection lowers it by up to 10 %.
    assert 0.9 * 0.745 <= scores[0] <= 0.745
    assert 0.9 <= scores[1] <= 1


def test_relations():
    centre = scene_object()
    assert clear_relation(scene_object(x=40.0), centre) == "left"
    assert clear_relation(scene_object(x=90.0, y=80.0), centre) == "right"  # 26 to the right, 16 below
    assert clear_relation(scene_object(y=40.0), centre) == "above"
    assert clear_relation(scene_object(y=90.0), centre) == "below"
    assert clear_relation(scene_object(x=79.0), centre) is None  # less than 16 pixels
    assert clear_relation(scene_object(x=90.0, y=88.0), centre) is None  # diagonal
    assert possible_relation("left", scene_object(x=67.0), centre)
    assert not possible_relation("left", scene_object(x=69.0), centre)
    assert possible_relation("below", scene_object(y=61.0), centre)
    assert not possible_relation("below", scene_object(y=59.0), centre)


def test_true_statements():
    left, right = scene_object(x=30.0), scene_object(x=90.0, y=30.0, size="small", shape="star")
    low = scene_object(x=60.0, y=100.0, colour="blue")
    a, b, c = ("large", "red", "circle"), ("small", "red", "star"), ("large", "blue", "circle")
    expected = {("left", a, b), ("left", a, c), ("left", c, b), ("above", b, a), ("above", a, c), ("above", b, c)}
    scene = Scene("three", (left, right, low), (0, 1), (0, 0, 0))
    assert true_statements(scene) == expected | {("together", c, a, b)}
    assert describe((None, "orange", "ring")) == "an orange ring"


def test_tokenizer(scenes_dir, splits):
    tokenizer = AutoTokenizer.from_pretrained(scenes_dir / "tokenizer", local_files_only=True)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[5:] == sorted(set(tokens[5:]))
    assert tokenizer.tokenize("A Large RED circle, 红色大圆形") == "a large red circle , 红 色 大 圆 形".split()
    assert tokenizer.tokenize("dog-42!") == ["d", "##o", "##g", "-", "4", "##2", "!"]
    texts = []
    for row in [row for rows in splits.values() for row in rows]:
        texts += row["captions"] + row["captions_zh"]
        texts += [text for item in row["questions"] for text in (item["question"], item["answer"])]
        texts += [text for item in row["choices"] for text in (item["question"], *item["choices"])]
    for text, input_ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in input_ids, text
        assert len(input_ids) <= 36, text
    # Whole words, never letters: the grammar's vocabulary is complete.
    assert not [token for text in texts for token in tokenizer.tokenize(text) if token.startswith("##")]


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_validation: expected at least 1 scene, got 0"):
        write_scenes(tmp_path / "scenes", 1, 0, 1)
    with pytest.raises(ValueError, match="expected one of .*got 'dev'"):
        next(generate_split("dev", 1, 0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        write_scenes(tmp_path / "other", 1, 1, 1)
    with pytest.raises(FileExistsError, match="expected a folder of scenes to overwrite"):
        write_scenes(tmp_path / "other", 1, 1, 1, overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    scene = next(generate_split("validation", 1, 0))
    monkeypatch.setattr(generate_scenes, "sample_scene", lambda *args: scene)
    with pytest.raises(ValueError, match="validation: expected fewer scenes, got 2"):
        list(generate_split("validation", 2, 0))
