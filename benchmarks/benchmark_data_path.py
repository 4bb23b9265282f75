"""
Measures how fast a region dataset is read, memory-mapped and streamed, and collated for pretraining, in one process.

```bash
python benchmarks/benchmark_data_path.py \\
    --dataset_name outputs/quickstart/scenes --tokenizer_name outputs/quickstart/scenes/tokenizer
```

Times are of the second pass over the same rows: the first one brings the files into memory. Masking includes
building the targets of masked regions. Memory is that of the process without the pages of memory-mapped files, which
the system takes back when it needs them; a second epoch must not add to it.
"""

import argparse
import time
from collections.abc import Iterable

import psutil
from transformers import AutoTokenizer

from processing.pretraining import PretrainingCollator, PretrainingPairs
from processing.processing_interbert import InterBERTProcessor, pad_regions
from processing.region_dataset import RegionDataset, load_region_dataset
from processing.streaming import RegionStream

OBJECTIVES = ("mlm,mom,itm", "msm,mrm,itm")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the speed of reading and collating a region dataset.")
    parser.add_argument("--dataset_name", required=True, help="Local folder or Hub name of a region dataset.")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokenizer_name", required=True, help="Local folder or Hub name of a BERT tokenizer.")
    parser.add_argument("--cache_dir", default=None, help="Where `datasets` keeps its Arrow files.")
    parser.add_argument("--rows_per_window", type=int, default=2048, help="Of the streamed reading.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_batches", type=int, default=100, help="At most so many batches of pairs are timed.")
    parser.add_argument("--max_length", type=int, default=36, help="Tokens of a text, special tokens included.")
    parser.add_argument("--max_regions", type=int, default=36)
    return parser.parse_args()


def own_memory() -> float:
    """Megabytes of the process, without memory-mapped files."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e6


def time_records(records: Iterable[dict]) -> tuple[float, float, float]:
    """Records a second in the second of two passes, and the process's memory in MB after each of them."""
    memory = []
    for _ in range(2):
        start = time.perf_counter()
        num_records = sum(1 for _ in records)
        seconds = time.perf_counter() - start
        memory.append(own_memory())
    return num_records / seconds, *memory


def time_batches(
    dataset: RegionDataset, processor: InterBERTProcessor, objectives: str, args: argparse.Namespace
) -> tuple[int, dict[str, float]]:
    """Returns the number of pairs and the seconds of the whole and of its parts."""
    pairs = PretrainingPairs(dataset, objectives=objectives)
    collator = PretrainingCollator(
        processor, objectives=objectives, max_length=args.max_length, max_regions=args.max_regions
    )
    # Strided, so that pairs of the same image do not come one after the other.
    num_pairs = min(len(pairs), args.num_batches * args.batch_size)
    indices = range(0, len(pairs), len(pairs) // num_pairs)[:num_pairs]
    seconds = dict.fromkeys(("total", "reading", "tokenising", "padding"), 0.0)
    for measured in (False, True):
        for first in range(0, num_pairs, args.batch_size):
            clock = [time.perf_counter()]
            samples = [pairs[index] for index in indices[first : first + args.batch_size]]
            clock.append(time.perf_counter())
            collator(samples)
            clock.append(time.perf_counter())
            # These two are part of the collator; running them again by themselves gives their share.
            collator.tokenize([sample["caption"] for sample in samples])
            clock.append(time.perf_counter())
            pad_regions([sample["record"] for sample in samples], processor.region_feature_size, args.max_regions)
            clock.append(time.perf_counter())
            if measured:
                seconds["total"] += clock[2] - clock[0]
                seconds["reading"] += clock[1] - clock[0]
                seconds["tokenising"] += clock[3] - clock[2]
                seconds["padding"] += clock[4] - clock[3]
    seconds["masking"] = seconds["total"] - seconds["reading"] - seconds["tokenising"] - seconds["padding"]
    return num_pairs, seconds


def main() -> None:
    args = parse_args()
    dataset = load_region_dataset(args.dataset_name, args.split, cache_dir=args.cache_dir)
    processor = InterBERTProcessor(AutoTokenizer.from_pretrained(args.tokenizer_name), dataset.region_feature_size)
    print(f"{len(dataset)} images, region features of width {dataset.region_feature_size}")
    stream = RegionStream.open(args.dataset_name, args.split, args.rows_per_window)
    for name, records in (("memory-mapped", dataset), ("streamed", stream)):
        rate, first, second = time_records(records)
        print(f"records, {name}: {rate:,.0f}/s (memory after one epoch {first:,.0f} MB, after two {second:,.0f} MB)")
    for objectives in OBJECTIVES:
        num_pairs, seconds = time_batches(dataset, processor, objectives, args)
        parts = ", ".join(
            f"{name} {seconds[name] / num_pairs * 1e6:.0f}" for name in ("reading", "tokenising", "masking", "padding")
        )
        print(f"{objectives}: {num_pairs / seconds['total']:,.0f} pairs/s (microseconds a pair: {parts})")


if __name__ == "__main__":
    main()
