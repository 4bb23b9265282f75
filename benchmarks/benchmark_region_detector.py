"""
Measures the region detector at its published size on one picture: seconds, memory, and the share of the machine's
matrix-multiplication peak, in float32 and in bfloat16.

```bash
python benchmarks/benchmark_region_detector.py
python benchmarks/benchmark_region_detector.py --device cuda --height 600 --width 800
```

The weights are random, and so are the pixels: the time does not depend on what is found, but on the number of proposals
and of regions, which are those of the published detector. The peak is the highest speed of square multiplications in
float32. "parts" are the stages of the float32 model by themselves.

On a CPU, keep the C library from returning the memory of each run to the system:

```bash
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 python benchmarks/benchmark_region_detector.py
```
"""

import argparse
import functools
import resource
import statistics

import torch
from measuring import (
    DTYPES,
    add_measuring_arguments,
    count_flops,
    describe_machine,
    has_bf16_instructions,
    measure,
    milliseconds,
    print_table,
)

from processing import FasterRCNNConfig, FasterRCNNForRegionFeatures
from processing.modeling_faster_rcnn import Bottleneck


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the region detector.")
    add_measuring_arguments(parser, rounds=3)
    parser.add_argument("--height", type=int, default=600, help="Of the picture, in pixels.")
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument(
        "--dtypes",
        choices=["float32", "bfloat16"],
        nargs="+",
        help="By default both, or float32 alone where there are no instructions for the other.",
    )
    parser.add_argument("--square_sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="Of the peak.")
    return parser.parse_args(arguments)


def peak_memory(device: torch.device) -> str:
    """Of this process on a CPU, of the device elsewhere."""
    if device.type == "cpu":
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB of the process"
    return f"{getattr(torch, device.type).max_memory_allocated() / 2**20:,.0f} MiB of the device"


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    config = FasterRCNNConfig()
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    model = FasterRCNNForRegionFeatures(config).eval().to(device)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            # Untrained, every block doubles the variance: after 30 of them no proposal would be in the picture.
            torch.nn.init.constant_(module.conv3.norm.weight, 0.1)
    pixel_values = torch.randn(1, 3, args.height, args.width, device=device) * 60
    print(f"{model.num_parameters():,} parameters, a picture of {args.height} x {args.width} pixels")
    print(describe_machine(device, "float32"))

    @torch.inference_mode()
    def detect(dtype: torch.dtype):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            model(pixel_values)

    with torch.inference_mode():
        feature_map = model.backbone(pixel_values)
        sizes = torch.tensor([[args.height, args.width]], device=device)
        proposals, _ = model.proposal_generator(feature_map, sizes)
    print(f"{len(proposals[0])} proposals")

    dtypes = args.dtypes or ["float32"] + ["bfloat16"] * has_bf16_instructions(device)
    if args.dtypes is None and len(dtypes) == 1:
        print("bfloat16: skipped, as this CPU has no instructions for it; --dtypes measures it all the same")
    whole = {f"picture to regions, {name}": functools.partial(detect, DTYPES[name]) for name in dtypes}
    parts = {
        "parts: map at stride 16": torch.inference_mode()(lambda: model.backbone(pixel_values)),
        "parts: proposals": torch.inference_mode()(lambda: model.proposal_generator(feature_map, sizes)),
        "parts: features of proposals": torch.inference_mode()(lambda: model.roi_heads.extract(feature_map, proposals)),
    }
    # Of the whole once for all dtypes: they multiply as often, and without instructions for it bfloat16 takes minutes.
    flops = dict.fromkeys(whole, count_flops(functools.partial(detect, DTYPES[dtypes[0]])))
    flops |= {name: count_flops(run) for name, run in parts.items()}
    variants = whole | parts
    for size in args.square_sizes:
        left, right = torch.randn(2, size, size, device=device)
        name = f"{size} x {size} times {size} x {size}"
        variants[name], flops[name] = functools.partial(torch.matmul, left, right), 2 * size**3
    seconds = measure(variants, args.rounds, device, args.seed)
    speeds = {name: flops[name] / statistics.median(values) for name, values in seconds.items()}
    peak = max(speed for name, speed in speeds.items() if " times " in name)
    print_table(
        [
            {
                "": name,
                "GFLOP": f"{flops[name] / 1e9:,.1f}",
                "ms": milliseconds(values),
                "GFLOP/s": f"{speeds[name] / 1e9:,.1f}",
                "share of the peak": f"{100 * speeds[name] / peak:.0f} %",
            }
            for name, values in seconds.items()
        ]
    )
    print(f"Peak memory: {peak_memory(device)}")


if __name__ == "__main__":
    main()
