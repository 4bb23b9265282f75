"""The size of the benchmarked models, and their inputs: drawn, or of the lengths of a region dataset."""

import argparse
import itertools
import string

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer, BertTokenizer

from configuration_interbert import InterBERTConfig
from processing import (
    InterBERTProcessor,
    PretrainingCollator,
    PretrainingPairs,
    RegionDataset,
    load_region_dataset,
)
from processing.sampling import BATCHES_PER_WINDOW, shuffle_by_length

# The authors' release; everything else of it is InterBERTConfig's default: 157M parameters with the pretraining heads.
RELEASE = {"num_hidden_layers": 6, "vision_num_attention_heads": 8, "vision_hidden_dropout_prob": 0.2}
MAX_TOKENS = MAX_REGIONS = 36  # of a pair in pretraining (paper, section 4)
IMAGE_SIZE = 500  # pixels, both sides

# Lengths of drawn inputs. Captions, special tokens counted: normal, at least 5, much as those of Flickr8k. Regions of
# an image: uniform, from the paper's 10 to its 36.
TOKENS_MEAN, TOKENS_DEVIATION, MIN_TOKENS = 14, 4, 5
MIN_REGIONS = 10
DRAWN_LENGTHS = (
    f"drawn: captions of normal(mean {TOKENS_MEAN}, standard deviation {TOKENS_DEVIATION}) tokens, at least "
    f"{MIN_TOKENS}; images of uniform({MIN_REGIONS}, {MAX_REGIONS}) regions"
)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_name", default=None, help="Local folder or Hub name of a region dataset.")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokenizer_name", default=None, help="Local folder or Hub name of its BERT tokenizer.")
    parser.add_argument("--cache_dir", default=None, help="Where `datasets` keeps its Arrow files.")


def build_config(overrides: str | None, **sizes) -> InterBERTConfig:
    """The release's configuration with `overrides` such as `"hidden_size=128,num_text_layers=2"`."""
    config = InterBERTConfig(**RELEASE | sizes)
    if overrides is not None:
        config.update_from_string(overrides)
        config.validate()  # setting values checks each of them, but not whether they fit together
    return config


def build_tokenizer(vocab_size: int) -> BertTokenizer:
    """A tokenizer whose every word is one token."""
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=3))
    tokens = [*special_tokens, *itertools.islice(words, vocab_size - len(special_tokens))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=512)


def draw_captions(
    rng: np.random.Generator, tokenizer: BertTokenizer, count: int, max_tokens: int = MAX_TOKENS
) -> list[str]:
    """Captions of 5 to `max_tokens` tokens."""
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"`max_tokens` must be at least {MIN_TOKENS}, the shortest caption, got {max_tokens}.")
    words = [token for token in tokenizer.get_vocab() if token.isalpha()]
    captions = []
    while len(captions) < count:
        num_tokens = round(rng.normal(TOKENS_MEAN, TOKENS_DEVIATION))
        if MIN_TOKENS <= num_tokens <= max_tokens:
            captions.append(" ".join(rng.choice(words, num_tokens - 2)))
    return captions


def draw_boxes(rng: np.random.Generator, num_regions: int) -> np.ndarray:
    corners = np.sort(rng.uniform(0, IMAGE_SIZE, (num_regions, 2, 2)), axis=1)  # (regions, corner, axis)
    return corners.reshape(num_regions, 4).astype(np.float32)


def draw_record(rng: np.random.Generator, num_regions: int, region_feature_size: int) -> dict:
    """One image as the processor takes it. Detectors' features are not negative."""
    return {
        "features": np.abs(rng.standard_normal((num_regions, region_feature_size), dtype=np.float32)),
        "boxes": draw_boxes(rng, num_regions),
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
    }


def draw_region_dataset(
    rng: np.random.Generator, tokenizer: BertTokenizer, num_images: int, config: InterBERTConfig
) -> RegionDataset:
    """Images of 10 to 36 regions with five captions each, in memory."""
    counts = rng.integers(MIN_REGIONS, MAX_REGIONS + 1, num_images)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    records = [draw_record(rng, count, config.region_feature_size) for count in counts]

    def vectors(name, dtype):
        values = np.concatenate([record[name] for record in records]).astype(dtype)
        return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]))

    class_ids = rng.integers(0, config.num_region_classes, counts.sum(), dtype=np.int32)
    captions = draw_captions(rng, tokenizer, 5 * num_images)
    table = pa.table(
        {
            "image_id": [str(i) for i in range(num_images)],
            "width": pa.array([IMAGE_SIZE] * num_images, pa.int32()),
            "height": pa.array([IMAGE_SIZE] * num_images, pa.int32()),
            "boxes": vectors("boxes", np.float32),
            "features": vectors("features", np.float16),
            "class_ids": pa.ListArray.from_arrays(offsets, class_ids),
            "captions": [captions[5 * i : 5 * i + 5] for i in range(num_images)],
        }
    )
    return RegionDataset(datasets.Dataset(table))


class PretrainingBatches:
    """
    Batches as examples/run_pretrain.py makes them, with the objectives MLM, MOM and ITM, of the pairs of a region
    dataset or, without `--dataset_name`, of drawn ones.

    Args:
        args: With `dataset_name`, `split`, `tokenizer_name`, `cache_dir`, `config_overrides`, `batch_size` and `seed`.
    """

    def __init__(self, args: argparse.Namespace):
        if (args.dataset_name is None) != (args.tokenizer_name is None):
            raise ValueError("`--dataset_name` and `--tokenizer_name` need each other, but one of them is missing.")
        self.batch_size = args.batch_size
        self.seed = args.seed
        if args.dataset_name is not None:
            self.source = f"{args.dataset_name}, split {args.split}"
            regions = load_region_dataset(args.dataset_name, args.split, cache_dir=args.cache_dir)
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
            sizes = {"vocab_size": len(tokenizer), "region_feature_size": regions.region_feature_size}
            self.config = build_config(args.config_overrides, region_objective="hard_class", **sizes)
        else:
            self.source = DRAWN_LENGTHS
            self.config = build_config(args.config_overrides, region_objective="hard_class")
            tokenizer = build_tokenizer(self.config.vocab_size)
            num_images = -(-BATCHES_PER_WINDOW * args.batch_size // 5)  # as many pairs as are grouped at a time
            regions = draw_region_dataset(np.random.default_rng(args.seed), tokenizer, num_images, self.config)
        processor = InterBERTProcessor(tokenizer, region_feature_size=regions.region_feature_size)
        self.pairs = PretrainingPairs(regions, seed=args.seed)
        self.collator = PretrainingCollator(processor, max_length=MAX_TOKENS, max_regions=MAX_REGIONS)

    def collate(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return self.collator([self.pairs[index] for index in indices])

    def shuffled(self, num_batches: int) -> list[dict[str, torch.Tensor]]:
        """Batches of pairs in any order."""
        order = np.random.default_rng(self.seed).permutation(len(self.pairs))
        batches = order[: num_batches * self.batch_size].reshape(-1, self.batch_size)
        return [self.collate(batch) for batch in batches]

    def grouped(self, num_batches: int) -> list[dict[str, torch.Tensor]]:
        """
        Batches of pairs of similar lengths. They are to stand for all 64 batches that are grouped together, so they are
        taken at even distances from these, sorted by their lengths.
        """
        lengths = self.pairs.lengths()
        order = shuffle_by_length(lengths, self.batch_size, np.random.default_rng(self.seed))
        num_grouped = min(BATCHES_PER_WINDOW, len(order) // self.batch_size)
        batches = order[: num_grouped * self.batch_size].reshape(num_grouped, self.batch_size)
        batches = batches[np.lexsort(lengths[batches].mean(axis=1).T[::-1])]
        chosen = ((np.arange(num_batches) + 0.5) * num_grouped / num_batches).astype(int)
        return [self.collate(batch) for batch in batches[chosen]]


def pad_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with all texts padded to 36 tokens and all images to 36 regions."""
    fill_values = {"labels": -100, "region_targets": -1}
    padded = {}
    for name, tensor in batch.items():
        if name == "itm_labels":
            padded[name] = tensor
            continue
        length = MAX_REGIONS if name.startswith("region_") else MAX_TOKENS
        amounts = [0, 0] * (tensor.dim() - 2) + [0, length - tensor.shape[1]]
        padded[name] = torch.nn.functional.pad(tensor, amounts, value=fill_values.get(name, 0))
    return padded
