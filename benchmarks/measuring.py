"""What the benchmarks share: the machine in one line, timing in turns, and tables."""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

# The benchmarks time what users run, and the scripts in examples/ import one another by plain name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_measuring_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--config_overrides",
        default=None,
        help="Values of the configuration in place of the release's, such as hidden_size=128,num_text_layers=2.",
    )
    parser.add_argument("--device", default="cpu", help="Such as cpu or cuda.")
    parser.add_argument("--rounds", type=int, default=rounds, help="Times that everything is measured, in turns.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, inputs and the order within a round.")


def has_bf16_instructions(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast: on CPUs without such instructions they are emulated."""
    if device.type != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 does not say
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def describe_machine(device: torch.device, dtype: str) -> str:
    """Device, cores, threads, versions and number format in one line."""
    if device.type == "cpu":
        name = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
        name += f", {torch.get_num_threads()} threads"
    else:
        name = getattr(torch, device.type).get_device_name(device)
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}; {dtype}"


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter() - start


def measure(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """
    Runs every variant once unmeasured, then once in each round. A round has an order of its own, so that what else the
    machine does, and what a variant leaves behind in the caches, hits all alike.

    Returns:
        Seconds of each variant, one number per round.
    """
    order, shuffle = list(variants), random.Random(seed).shuffle
    for run in variants.values():
        seconds_of(run, device)
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(variants[name], device))
    return seconds


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that `run` computes, backward passes included: one multiply-add
    is two. Only eager attention is counted on every device."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def speed_ratio(baseline: Sequence[float], seconds: Sequence[float]) -> str:
    """How many times as fast as the baseline: median over the rounds, and from the lowest to the highest."""
    ratios = [first / second for first, second in zip(baseline, seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def milliseconds(seconds: Sequence[float]) -> str:
    value = 1000 * statistics.median(seconds)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def per_second(count: float, seconds: Sequence[float]) -> str:
    value = count / statistics.median(seconds)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Prints rows with the same keys as a Markdown table whose columns are aligned: the first to the left."""
    header = list(rows[0])
    lines = [header, *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def format_line(line):
        cells = [line[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(line[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    print("\n".join(["", format_line(header), format_line(rule), *map(format_line, lines[1:]), ""]), flush=True)
