"""Pictures found by image id, and boxes with labels drawn on them."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pictures import open_picture
from region_drawing import draw_boxes, place_label


def test_pictures_are_named_by_image_id(tmp_path):
    Image.new("L", (30, 20), 7).save(tmp_path / "first.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "second.jpg")
    picture = open_picture(str(tmp_path), "first")
    assert (picture.size, picture.getcolors()) == ((30, 20), [(600, (7, 7, 7))])
    assert open_picture(str(tmp_path), "second.jpg").size == (10, 10)
    with pytest.raises(ValueError, match=r"must hold a picture named third or third\.\*, got"):
        open_picture(str(tmp_path), "third")


@pytest.mark.parametrize("image_id", ["train [1]", "train [1].jpg"])
def test_names_of_pictures_are_taken_literally(tmp_path, image_id):
    Image.new("RGB", (10, 10)).save(tmp_path / "train 1.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "train [1].jpg")
    assert open_picture(str(tmp_path), image_id).size == (30, 20)


def test_image_ids_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "photographs" / "a").mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(tmp_path / "secret.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "photographs" / "a" / "b.png")
    assert open_picture(str(tmp_path / "photographs"), "a/b").size == (30, 20)
    for image_id in ("../secret", "a/../../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(ValueError, match="expected an image id that names a file in the folder, got .*secret"):
            open_picture(str(tmp_path / "photographs"), image_id)


def test_boxes_and_labels_are_where_they_belong():
    figure = Figure((4, 2))
    ax = figure.add_axes((0, 0, 0.5, 1))  # two inches, 100 pixels each
    boxes = np.array([[50.0, 100, 150, 180], [0, 0, 200, 200]])
    draw_boxes(ax, Image.new("RGB", (200, 200)), boxes, [(0, 0, 0, 1), (1, 1, 1, 1)], ["a", "bcd"])
    outlines = [patch.get_bbox().extents.tolist() for patch in ax.patches if isinstance(patch, Rectangle)]
    assert outlines == boxes.tolist()
    assert ax.patches[0].zorder > ax.patches[1].zorder
    first, second = ax.texts
    assert (first.get_text(), first.get_color(), second.get_text(), second.get_color()) == (
        "a",
        "white",
        "bcd",
        "black",
    )
    # A label is 1.5 * 8 points high and padded by 0.15 * 8 points. It stands on the upper edge of its box, or inside
    # where that is the border; a point is 100 / 72 pixels.
    assert first.get_position() == pytest.approx((50 + 1.2 * 100 / 72, 100 - 6 * 100 / 72))
    assert second.get_position() == pytest.approx((1.2 * 100 / 72, 6 * 100 / 72))


def test_labels_do_not_overlap():
    """One box ten times: first its corners, then further down."""
    picture, taken = Image.new("RGB", (100, 100)), []
    for _ in range(10):
        left, top = place_label((20, 30, 60, 50), 10, 8, picture, taken)
        taken.append((left, top, left + 10))
    assert [(left, top) for left, top, _ in taken[:5]] == [(20, 22), (50, 22), (20, 50), (50, 50), (20, 30)]
    for i, (left, top, right) in enumerate(taken):
        for other_left, other_top, other_right in taken[:i]:
            assert right <= other_left or other_right <= left or abs(top - other_top) >= 8
    # At the border, labels stay inside the picture.
    assert place_label((95, 0, 100, 100), 10, 8, picture, []) == (90, 0)
    assert place_label((0, 2, 9, 100), 10, 8, picture, [(0, 0, 10)]) == (0, 92)
