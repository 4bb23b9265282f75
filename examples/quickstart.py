#!/usr/bin/env python
"""
From nothing to a pretrained model in minutes on a CPU: generates scenes, pretrains a tiny InterBERT on them from
scratch in two stages, retrieves unseen scenes by their captions, and shows the result.

    python examples/quickstart.py

The same with nothing but pixels: a small detector learns to find the objects first, and its regions take the place of
the true boxes, whose features are drawn with the scenes:

    python examples/quickstart.py --detect_regions --output_dir outputs/quickstart_from_pixels

The scenes of the test split hold pairs of objects that no training scene holds.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from modeling_interbert import InterBERTForPreTraining
from processing import InterBERTProcessor, RegionDataset, load_region_dataset
from processing.ranking import retrieval_recall
from retrieval_evaluation import score_captions_against_images
from training import format_table

EXAMPLES = Path(__file__).resolve().parent

GENERATE = "--num_train 12000 --num_validation 200 --num_test 200"
TRAIN_DETECTOR = """
    --do_train --do_eval --max_train_steps 1100 --per_device_train_batch_size 8 --learning_rate 2e-3
    --num_warmup_steps 50 --overwrite_output_dir
"""
# The pictures of 128 x 128 pixels go along, to be shown.
EXTRACT = "--columns captions --thumbnails 128 --batch_size 8"
# 3 + 1 + 1 layers of width 128. So few passes over the data leave nothing for dropout to do, and one masked modality
# at a time (the default) would halve what is learned in these minutes. No first caption has more than 20 tokens.
PRETRAIN = """
    --config_overrides hidden_size=128,num_attention_heads=4,vision_num_attention_heads=4,intermediate_size=256,\
vision_intermediate_size=256,num_hidden_layers=3,num_text_layers=1,num_vision_layers=1,pooler_size=128,\
initializer_range=0.05,hidden_dropout_prob=0,vision_hidden_dropout_prob=0,attention_probs_dropout_prob=0,\
vision_attention_probs_dropout_prob=0
    --objectives mlm,mom,itm msm,mrm,itm --stage_epochs 2 2 --conditional_masking false
    --per_device_train_batch_size 64 --max_seq_length 20 --learning_rate 7e-4 --num_warmup_steps 100
    --retrieval_eval_every_epoch false --overwrite_output_dir --model_card interbert-tiny-scenes
    --widget_pictures
"""


# Training on a CPU: unless told to keep it, glibc returns the memory of every step to the system and faults it in
# again, which can take half of the time; and threads that spin for long at their barriers crawl where another program
# runs, while those that do not spin at all are no faster than one.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 1024**3),
    "GOMP_SPINCOUNT": "10000",
}


def run(*command: str):
    """Runs a script with this interpreter, after showing the command."""
    print(f"\n$ python {shlex.join(command)}\n", flush=True)
    subprocess.run([sys.executable, *command], check=True, env=os.environ | CPU_ENVIRONMENT)


def detect_regions(scenes: Path, output_dir: Path) -> list[str]:
    """
    Trains a detector on the pictures of the scenes, and makes a region dataset of what it finds.

    Returns:
        The arguments of run_pretrain.py that name the dataset and the detector.
    """
    detector, regions = output_dir / "detector", output_dir / "regions"
    shutil.rmtree(regions, ignore_errors=True)  # of another detector
    run(
        *(str(EXAMPLES / "train_region_detector.py"), "--dataset_name", str(scenes)),
        *(*TRAIN_DETECTOR.split(), "--output_dir", str(detector)),
    )
    for split in ("train", "validation", "test"):
        run(
            *(str(EXAMPLES / "extract_regions.py"), str(scenes), str(regions), "--split", split),
            *("--detector", str(detector), *EXTRACT.split()),
        )
    return ["--dataset_name", str(regions), "--region_detector", str(detector)]


def retrieval_table(scores: np.ndarray) -> str:
    recalls = retrieval_recall(scores, np.arange(len(scores))[:, None])
    rows = [
        {"zero-shot retrieval": name, **{f"R@{k}": 100 * recalls[f"{direction}_recall_at_{k}"] for k in (1, 5, 10)}}
        for name, direction in (("caption → image", "image"), ("image → caption", "text"))
    ]
    rows.append({"zero-shot retrieval": "chance", **{f"R@{k}": 100 * k / len(scores) for k in (1, 5, 10)}})
    return format_table(rows)


def draw_top_images(
    regions: RegionDataset, captions: list[str], scores: np.ndarray, queries: list[int], path: Path, num_images: int = 5
):
    """Draws for each query its caption and the images with the highest scores; the right image has a green frame."""
    font, size, margin, caption_height = ImageFont.load_default(16), 160, 12, 34
    row_height = caption_height + size + 28 + margin
    canvas = Image.new(
        "RGB", (margin + num_images * (size + margin), margin + row_height * len(queries)), color="white"
    )
    draw = ImageDraw.Draw(canvas)
    pictures = regions.dataset.select_columns(["image"])
    for row, query in enumerate(queries):
        top = margin + row * row_height
        draw.text((margin, top), f"“{captions[query]}”", fill="black", font=font)
        for rank, image in enumerate(np.argsort(-scores[query], kind="stable")[:num_images].tolist()):
            left, upper = margin + rank * (size + margin), top + caption_height
            canvas.paste(pictures[image]["image"].resize((size, size)), (left, upper))
            frame = "#1a9641" if image == query else "#bbbbbb"
            draw.rectangle((left - 3, upper - 3, left + size + 2, upper + size + 2), outline=frame, width=3)
            match_score = 1 / (1 + np.exp(-scores[query, image]))
            draw.text((left, upper + size + 6), f"{match_score:.4f}", fill="black", font=font)
    canvas.save(path)


def main():
    parser = argparse.ArgumentParser(description="Generate scenes, pretrain a tiny InterBERT, retrieve scenes.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="Where all of it goes.")
    parser.add_argument(
        "--detect_regions",
        action="store_true",
        help="Trains a detector first, and takes its regions, not the true boxes.",
    )
    args = parser.parse_args()
    start = time.monotonic()
    scenes, model_dir = args.output_dir / "scenes", args.output_dir / "model"

    run(str(EXAMPLES / "generate_scenes.py"), str(scenes), *GENERATE.split(), "--overwrite")
    dataset = detect_regions(scenes, args.output_dir) if args.detect_regions else ["--dataset_name", str(scenes)]
    run(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        *("--num_cpu_threads_per_process", str(torch.get_num_threads()), str(EXAMPLES / "run_pretrain.py")),
        *(*dataset, "--tokenizer_name", str(scenes / "tokenizer")),
        *PRETRAIN.split(),
        *("--output_dir", str(model_dir)),
    )

    model = InterBERTForPreTraining.from_pretrained(model_dir)
    processor = InterBERTProcessor.from_pretrained(model_dir)
    regions = load_region_dataset(dataset[1], "test")
    captions = [regions.captions(i)[0] for i in range(len(regions))]
    records = [regions[i] for i in range(len(regions))]
    scores = score_captions_against_images(Accelerator(cpu=True), model, processor, captions, records)
    picture = args.output_dir / "retrieval.png"
    draw_top_images(regions, captions, scores, queries=[0, 1, 2, 3], path=picture)

    print(f"\n{len(regions)} unseen scenes, {len(captions)} captions:\n\n{retrieval_table(scores)}\n")
    print(f"Four captions with the images that match best: {picture}")
    print("The model loads with transformers alone:\n")
    load = f"AutoModel.from_pretrained('{model_dir}', trust_remote_code=True)"
    print(f'    python -c "from transformers import AutoModel; print({load})"\n')
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
