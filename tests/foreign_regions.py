"""
Small sources of region features in the formats of the field, written as the original tools write them.

Nothing of `processing.region_formats` is used, so that a reader is not tried on what its own writer thinks.
"""

import base64
import csv
import pickle
from pathlib import Path

import h5py
import lmdb
import msgpack
import numpy as np

NUM_CLASSES = 6
BOTTOM_UP_FIELDS = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]
LXMERT_FIELDS = ["img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes"]
LXMERT_FIELDS += ["boxes", "features"]


def make_records(region_counts=(3, 1, 4, 2), feature_size=8, seed=0):
    """One record per region count, in float32, with everything that a source may tell of an image. Class ids are the
    largest class probabilities, class 0 of them being the background; box edges are quarters of a pixel."""
    generator = np.random.default_rng(seed)
    records = []
    for index, n in enumerate(region_counts):
        width, height = 320 + index, 200 + 3 * index
        corners = np.sort(generator.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4)
        boxes = np.floor(corners * [width, height, width, height] * 4) / 4
        # One box reaches the border, as some proposal of a detector always does.
        boxes[0] = [0, 0, width, height]
        logits = generator.normal(size=(n, NUM_CLASSES + 1))
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        records.append(
            {
                "image_id": str(1000 - index),
                "width": width,
                "height": height,
                "boxes": boxes.astype(np.float32),
                "features": generator.normal(size=(n, feature_size)).astype(np.float32),
                "class_ids": probs[:, 1:].argmax(axis=1).astype(np.int32),
                "class_scores": probs[:, 1:].max(axis=1).astype(np.float32),
                "class_probs": probs.astype(np.float32),
                "attribute_ids": generator.integers(0, 5, n).astype(np.int32),
                "attribute_scores": generator.uniform(size=n).astype(np.float32),
                "captions": [f"caption {index} {number}" for number in range(1 + index % 2)],
            }
        )
    return records


def encode(array, dtype=np.float32):
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype)).decode()


def bottom_up_item(record, class_probs=False):
    item = {
        "image_id": record["image_id"],
        "image_w": record["width"],
        "image_h": record["height"],
        "num_boxes": len(record["boxes"]),
        "boxes": encode(record["boxes"]),
        "features": encode(record["features"]),
    }
    return {**item, "cls_prob": encode(record["class_probs"])} if class_probs else item


def lxmert_item(record):
    return {
        "img_id": record["image_id"],
        "img_h": record["height"],
        "img_w": record["width"],
        "objects_id": encode(record["class_ids"], np.int64),
        "objects_conf": encode(record["class_scores"]),
        "attrs_id": encode(record["attribute_ids"], np.int64),
        "attrs_conf": encode(record["attribute_scores"]),
        "num_boxes": len(record["boxes"]),
        "boxes": encode(record["boxes"]),
        "features": encode(record["features"]),
    }


def write_tsv(path, items):
    """As `csv` writes them, with its own line ends."""
    with open(path, "w", newline="") as file:
        csv.DictWriter(file, fieldnames=list(items[0]), delimiter="\t").writerows(items)


def write_bottom_up_tsv(path, records, class_probs=False):
    write_tsv(path, [bottom_up_item(record, class_probs) for record in records])


def write_lxmert_tsv(path, records):
    write_tsv(path, [lxmert_item(record) for record in records])


def write_lmdb(path, values):
    """Keys and values, both bytes, in one transaction. A path that ends in .lmdb is a single file, others a folder."""
    environment = lmdb.open(str(path), map_size=2**30, subdir=Path(path).suffix != ".lmdb", lock=False)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()


def array_item(record):
    """The dict of vilbert-multi-task: numpy arrays of 2 rows more than count."""
    padding = ((0, 2), (0, 0))
    return {
        "image_id": record["image_id"],
        "image_h": record["height"],
        "image_w": np.int64(record["width"]),
        "num_boxes": len(record["boxes"]),
        "boxes": np.pad(record["boxes"], padding),
        "features": np.pad(record["features"], padding),
        "cls_prob": np.pad(record["class_probs"], padding),
    }


def vilbert_values(records, make_item, protocol=None, str_ids=False):
    ids = [record["image_id"] for record in records]
    values = {record["image_id"].encode(): pickle.dumps(make_item(record), protocol) for record in records}
    return {**values, b"keys": pickle.dumps(ids if str_ids else [image_id.encode() for image_id in ids], protocol)}


def write_vilbert_lmdb(path, records, make_item=lambda record: bottom_up_item(record, class_probs=True), **kwargs):
    write_lmdb(path, vilbert_values(records, make_item, **kwargs))


def encode_array(value):
    """What msgpack_numpy makes of numpy's types."""
    if isinstance(value, np.ndarray):
        data = value.dumps() if value.dtype.kind == "O" else value.tobytes()
        kind = b"O" if value.dtype.kind == "O" else b""
        return {b"nd": True, b"type": value.dtype.str, b"kind": kind, b"shape": value.shape, b"data": data}
    return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}


def pack(value):
    return msgpack.packb(value, use_bin_type=True, default=encode_array)


def tensorpack_row(record):
    """The numbers are strings, as `csv` read them."""
    arrays = [record[name] for name in ("features", "class_probs", "boxes")]
    numbers = [str(len(record["boxes"])), str(record["height"]), str(record["width"])]
    return [*arrays, *numbers, record["image_id"], record["captions"][0]]


def tensorpack_values(rows):
    values = {f"{number:08}".encode(): pack(row) for number, row in enumerate(rows)}
    return {**values, b"__keys__": pack(list(values))}


def write_tensorpack_lmdb(path, records):
    write_lmdb(path, tensorpack_values([tensorpack_row(record) for record in records]))


def normalized_boxes(record):
    """x1, y1, x2, y2, width, height in [0, 1], as float32."""
    size = np.array([record["width"], record["height"]], dtype=np.float32)
    corners, extents = record["boxes"][:, :2] / size, (record["boxes"][:, 2:] - record["boxes"][:, :2]) / size
    return np.concatenate([corners, corners + extents, extents], axis=1)


def npz_arrays(record):
    arrays = {
        "features": record["features"],
        "norm_bb": normalized_boxes(record),
        "conf": record["class_scores"],
        "soft_labels": record["class_probs"],
    }
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def write_npz(path, records):
    path.mkdir()
    for record in records:
        np.savez_compressed(path / f"{record['image_id']}.npz", **npz_arrays(record))


def npy_info(record, background=False):
    """Of 2 rows more than count. MMF leaves the background out of cls_prob, ViLBERT's version does not."""
    return {
        "bbox": np.pad(record["boxes"], ((0, 2), (0, 0))),
        "num_boxes": len(record["boxes"]),
        "objects": np.pad(record["class_ids"], (0, 2)).astype(np.int64),
        "cls_prob": np.pad(record["class_probs"] if background else record["class_probs"][:, 1:], ((0, 2), (0, 0))),
        "image_width": record["width"],
        "image_height": record["height"],
    }


def write_npy(path, records, background=False):
    path.mkdir()
    for record in records:
        np.save(path / f"{record['image_id']}.npy", np.pad(record["features"], ((0, 2), (0, 0))))
        np.save(path / f"{record['image_id']}_info.npy", npy_info(record, background))


def hdf5_arrays(records, adaptive=True):
    join = np.concatenate if adaptive else np.stack
    arrays = {
        "image_features": join([record["features"] for record in records]),
        "image_bb": join([record["boxes"] for record in records]),
        "spatial_features": join([normalized_boxes(record) for record in records]),
    }
    if adaptive:
        stops = np.cumsum([len(record["boxes"]) for record in records])
        arrays["pos_boxes"] = np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1).astype(np.int32)
    return arrays


def write_hdf5(path, records, adaptive=True, without=()):
    """Datasets, and beside them the index, with integers for ids."""
    with h5py.File(path, "w") as file:
        for name, array in hdf5_arrays(records, adaptive).items():
            if name not in without:
                file.create_dataset(name, data=array)
    index = {int(record["image_id"]): row for row, record in enumerate(records)}
    path.with_name(f"{path.stem}_imgid2idx.pkl").write_bytes(pickle.dumps(index))
