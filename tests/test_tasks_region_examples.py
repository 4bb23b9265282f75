import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from processing.region_dataset import RegionDataset
from processing.tasks import ExamplesWithRegions
from processing.tasks.region_examples import region_tensors

WIDTH = 2


def make_dataset(image_ids, region_counts):
    """The first number of every feature is the number of its image."""
    features = [[[float(i), float(j)] for j in range(count)] for i, count in enumerate(region_counts)]
    table = pa.table(
        {
            "image_id": image_ids,
            "width": pa.array([10] * len(image_ids), pa.int32()),
            "height": pa.array([20] * len(image_ids), pa.int32()),
            "boxes": pa.array(
                [[[1, 2, 5, 10]] * count for count in region_counts], pa.list_(pa.list_(pa.float32(), 4))
            ),
            "features": pa.array(features, pa.list_(pa.list_(pa.float16(), WIDTH))),
        }
    )
    return RegionDataset(datasets.Dataset(table))


def examples_of(*image_ids):
    return [SimpleNamespace(image_id=image_id, number=i) for i, image_id in enumerate(image_ids)]


def test_examples_meet_the_regions_of_their_images():
    dataset = make_dataset(["a", "COCO_val2014_000000000042", "c.jpg"], [2, 1, 3])
    joined = ExamplesWithRegions(examples_of("c", "42", "a", "COCO_val2014_000000000042", "c"), dataset)
    assert len(joined) == 5
    assert [joined[i]["record"]["features"][0, 0] for i in range(5)] == [2, 1, 0, 1, 2]
    assert [joined[i]["example"].number for i in range(5)] == [0, 1, 2, 3, 4]
    assert joined.lengths().tolist() == [3, 1, 2, 1, 3]
    # Selected rows are found where they are now.
    selected = RegionDataset(dataset.dataset.select([2, 0]))
    joined = ExamplesWithRegions(examples_of("a", "c"), selected)
    assert [joined[i]["record"]["image_id"] for i in range(2)] == ["a", "c.jpg"]
    assert joined.lengths().tolist() == [2, 3]
    assert pickle.loads(pickle.dumps(joined))[1]["record"]["image_id"] == "c.jpg"
    assert len(ExamplesWithRegions([], dataset)) == 0


def test_faulty_images():
    dataset = make_dataset(["a", "b"], [1, 0])
    with pytest.raises(ValueError, match=r"got 2 that are not among its 2 images \(such as 'a'\): \['x', 'y'\]\."):
        ExamplesWithRegions(examples_of("a", "x", "y", "x"), dataset)
    with pytest.raises(ValueError, match="at least one region for every example, got none for image 'b'"):
        ExamplesWithRegions(examples_of("a", "b"), dataset)
    with pytest.raises(ValueError, match="Rows 0 and 2 of the region dataset are of the same image, '9'"):
        ExamplesWithRegions(examples_of("b"), make_dataset(["COCO_train2014_000000000009", "b", "9"], [1, 1, 1]))


def test_region_tensors():
    dataset = make_dataset(["a", "b"], [3, 1])
    tensors = region_tensors([dataset[0], dataset[1]], WIDTH, max_regions=2)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "region_features": (torch.float32, (2, 2, WIDTH)),
        "region_boxes": (torch.float32, (2, 2, 4)),
        "region_attention_mask": (torch.int64, (2, 2)),
    }
    assert tensors["region_attention_mask"].tolist() == [[1, 1], [1, 0]]
    np.testing.assert_allclose(tensors["region_boxes"][0, 0], [0.1, 0.1, 0.5, 0.5])
