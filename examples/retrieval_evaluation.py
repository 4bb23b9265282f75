"""Image-text retrieval: match scores of all captions against all images."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_interbert import match_log_odds

IMAGES_PER_BLOCK = 16
AUTOCAST_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's mixed precision


@torch.inference_mode()
def score_captions_against_images(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    captions: Sequence[str],
    regions: Sequence[Mapping[str, Any]],
    batch_size: int = 256,
    max_length: int = 36,
    max_regions: int | None = 36,
    cache_dir: Path | None = None,
    pools: Sequence[Sequence[int] | None] | None = None,
) -> np.ndarray:
    """
    Scores every caption against every image, or against those of its pool, with the match head of InterBERT.

    Captions and images of similar lengths are scored together, so that next to nothing is spent on padding, and images
    are embedded once, however many captions they meet. Blocks of images are divided among the processes.

    Args:
        model: A model with the match head `itm_head`, on the device.
        captions: N captions.
        regions: Region records of M images, as the processor takes them; read one after the other, and not kept.
        batch_size: So many pairs at most are scored at a time.
        max_length: Captions are cut to this number of tokens.
        max_regions: Of each image, this many regions are used.
        cache_dir: Folder that keeps what is scored. Scoring that was stopped then goes on where it was, unless
            captions, images, pools or weights are others. Scores of others stay until these are complete: a training
            that is stopped while its averaged weights are evaluated finds those of its raw weights. The folder is for
            the caller to remove.
        pools: Of each caption, the numbers of the images that it is scored against; None for all of them.

    Returns:
        float32 array of shape `(N, M)`: the log-odds of a match, -inf outside of the pools, the same in every process.
        (Log-odds rather than probabilities, since float32 probabilities near 1 would tie.)
    """
    model.eval()
    device = accelerator.device
    is_scored = np.ones((len(captions), len(regions)), dtype=bool)
    if pools is not None:
        for row, pool in zip(is_scored, pools, strict=True):
            if pool is not None:
                row[:] = False
                row[list(pool)] = True
    image_order = np.argsort([len(record["features"]) for record in regions], kind="stable")
    are_all_scored = bool(is_scored.all())
    # Two images are seldom in the same pools.
    images_per_block = min(IMAGES_PER_BLOCK, batch_size) if are_all_scored else 1
    blocks = [image_order[start : start + images_per_block] for start in range(0, len(regions), images_per_block)]
    own_blocks = range(accelerator.process_index, len(blocks), accelerator.num_processes)
    token_counts = [len(ids) for ids in processor.tokenizer(captions, truncation=True, max_length=max_length).input_ids]
    caption_order = np.argsort(token_counts, kind="stable")

    def encode(chosen: np.ndarray) -> list[tuple[np.ndarray, Mapping[str, torch.Tensor]]]:
        captions_per_block = batch_size // images_per_block
        text_blocks = []
        for start in range(0, len(chosen), captions_per_block):
            block = chosen[start : start + captions_per_block]
            inputs = processor(
                text=[captions[i] for i in block], truncation=True, max_length=max_length, return_tensors="pt"
            )
            text_blocks.append((block, inputs.to(device)))
        return text_blocks

    all_text_blocks = encode(caption_order) if are_all_scored else None

    cache = None
    if cache_dir is not None:
        settings = [images_per_block, accelerator.mixed_precision, max_length, max_regions, list(captions)]
        cache = cache_dir / _fingerprint(settings, is_scored, regions, model)
        cache.mkdir(parents=True, exist_ok=True)
    scores = torch.zeros(len(captions), len(regions), device=device)
    progress_bar = tqdm(
        total=sum(int(is_scored[:, blocks[number]].sum()) for number in own_blocks),
        desc="Scoring pairs",
        unit="pairs",
        leave=False,
        disable=not accelerator.is_local_main_process,
    )
    is_complete_already = True
    for number in own_blocks:
        images = torch.as_tensor(blocks[number], device=device)
        chosen = caption_order[is_scored[:, blocks[number]].any(axis=1)[caption_order]]
        path = None if cache is None else cache / f"{number:06d}.npy"
        if path is not None and path.exists():
            scores[:, images] = torch.from_numpy(np.load(path)).to(device)
            progress_bar.update(len(chosen) * len(images))
        else:
            is_complete_already = False
            inputs = processor(
                regions=[truncate_regions(regions[i], max_regions) for i in blocks[number]], return_tensors="pt"
            ).to(device)
            text_blocks = encode(chosen) if all_text_blocks is None else all_text_blocks
            scores[:, images] = _score_block(accelerator, model, inputs, text_blocks, len(captions), progress_bar)
            if path is not None:
                unfinished = path.with_suffix(".unfinished")
                with open(unfinished, "wb") as file:
                    np.save(file, scores[:, images].cpu().numpy())
                unfinished.replace(path)
    progress_bar.close()
    scores = accelerator.reduce(scores, reduction="sum").cpu().numpy()
    if cache is not None:
        # Where nothing was left to be scored, the others may be what a stopped evaluation goes on with.
        if accelerator.is_main_process and not is_complete_already:
            for other in cache_dir.iterdir():
                if other != cache:
                    shutil.rmtree(other)
        accelerator.wait_for_everyone()
    return scores


def _score_block(
    accelerator: Accelerator,
    model: PreTrainedModel,
    image_inputs: Mapping[str, torch.Tensor],
    text_blocks: Sequence[tuple[np.ndarray, Mapping[str, torch.Tensor]]],
    num_captions: int,
    progress_bar: tqdm,
) -> torch.Tensor:
    """Log-odds of captions and the images of a block, float32 `(num_captions, images)`; -inf for other captions."""
    num_images = len(image_inputs["region_attention_mask"])
    scores = torch.full((num_captions, num_images), -torch.inf, device=accelerator.device)
    with accelerator.autocast():
        region_embeds = model.interbert.embed_regions(**image_inputs)
    for chosen, text_inputs in text_blocks:
        log_odds = match_log_odds(
            model,
            text_inputs,
            region_embeds,
            image_inputs["region_attention_mask"],
            AUTOCAST_DTYPES[accelerator.mixed_precision],
        )
        scores[torch.as_tensor(chosen, device=accelerator.device)] = log_odds
        progress_bar.update(len(chosen) * num_images)
    return scores


def _fingerprint(
    settings: list, is_scored: np.ndarray, regions: Sequence[Mapping[str, Any]], model: PreTrainedModel
) -> str:
    """Of everything that decides on the scores and on which image has which column."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(np.packbits(is_scored).data)
    for record in regions:
        for name in ("features", "boxes", "width", "height"):
            values = np.ascontiguousarray(record[name])
            digest.update(f"{values.dtype}{values.shape}".encode())
            digest.update(values.data)
    for parameter in model.state_dict().values():
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def truncate_regions(record: Mapping[str, Any], max_regions: int | None) -> dict[str, Any]:
    return {**record} | {"features": record["features"][:max_regions], "boxes": record["boxes"][:max_regions]}
