"""Image-text retrieval: match scores of all captions against all images, and recall at k."""

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin


@torch.inference_mode()
def score_captions_against_images(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    captions: list[str],
    regions: list[dict],
    batch_size: int = 256,
    max_length: int = 36,
    max_regions: int | None = 36,
) -> np.ndarray:
    """
    Scores every caption against every image with the match head of a pretrained InterBERT.

    Captions and images of similar lengths are scored together, so that next to nothing is spent on padding. The
    images are divided among the processes.

    Args:
        captions: N captions.
        regions: Region records of M images, as the processor takes them.
        batch_size: Pairs that are scored at a time.
        max_length: Captions are cut to this number of tokens.
        max_regions: Of each image, this many regions are used.

    Returns:
        float32 array of shape `(N, M)`: the log-odds of a match, the same in every process. (Log-odds rather than
        probabilities, since float32 probabilities near 1 would tie.)
    """
    model.eval()
    device = accelerator.device
    own_images = np.arange(accelerator.process_index, len(regions), accelerator.num_processes)
    own_images = own_images[np.argsort([len(regions[i]["features"]) for i in own_images], kind="stable")]
    token_counts = [len(ids) for ids in processor.tokenizer(captions, truncation=True, max_length=max_length).input_ids]
    caption_order = np.argsort(token_counts, kind="stable")

    images_per_block = min(16, batch_size)
    captions_per_block = max(1, batch_size // images_per_block)
    text_blocks = []
    for start in range(0, len(captions), captions_per_block):
        chosen = caption_order[start : start + captions_per_block]
        inputs = processor(
            text=[captions[i] for i in chosen], truncation=True, max_length=max_length, return_tensors="pt"
        )
        text_blocks.append((chosen, inputs.to(device)))

    scores = torch.zeros(len(captions), len(regions), device=device)
    progress_bar = tqdm(
        total=len(captions) * len(own_images),
        desc="Scoring pairs",
        unit="pairs",
        leave=False,
        disable=not accelerator.is_local_main_process,
    )
    for start in range(0, len(own_images), images_per_block):
        chosen_images = own_images[start : start + images_per_block]
        inputs = processor(
            regions=[truncate_regions(regions[i], max_regions) for i in chosen_images], return_tensors="pt"
        ).to(device)
        num_images = len(chosen_images)
        with accelerator.autocast():
            region_embeds = model.interbert.embed_regions(**inputs)  # once, however many captions the images meet
        for chosen_captions, text_inputs in text_blocks:
            num_captions = len(chosen_captions)
            pairs = {name: tensor.repeat_interleave(num_images, dim=0) for name, tensor in text_inputs.items()}
            pairs["region_embeds"] = region_embeds.repeat(num_captions, 1, 1)
            pairs["region_attention_mask"] = inputs["region_attention_mask"].repeat(num_captions, 1)
            with accelerator.autocast():
                outputs = model.interbert(**pairs, pooled_only=True)
            # Outside of autocast: half precision has so few digits that pairs would tie.
            dtype = model.itm_head.classifier.weight.dtype
            logits = model.itm_head(outputs.text_pooler_output.to(dtype), outputs.vision_pooler_output.to(dtype))
            logits = logits.float()
            log_odds = (logits[:, 0] - logits[:, 1]).view(num_captions, num_images)
            rows = torch.as_tensor(chosen_captions, device=device)[:, None]
            scores[rows, torch.as_tensor(chosen_images, device=device)] = log_odds
            progress_bar.update(num_captions * num_images)
    progress_bar.close()
    return accelerator.reduce(scores, reduction="sum").cpu().numpy()


def truncate_regions(record: dict, max_regions: int | None) -> dict:
    return record | {"features": record["features"][:max_regions], "boxes": record["boxes"][:max_regions]}


def recall_at_k(scores: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """
    Recall of both directions, for one caption per image.

    Args:
        scores: `(N, N)`: row i holds the scores of caption i, whose image is column i.
        ks: How many of the highest scores count.

    Returns:
        `image_recall_at_k`: share of captions whose image is among the k highest-scored images, and
        `text_recall_at_k`: the same for images and their captions. Ties count against the right one: a model that
        scores all pairs alike has recall 0 for k < N, and so has one whose scores are not numbers.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"`scores` must have shape (N, N), got {scores.shape}.")
    right = np.diagonal(scores)
    results = {}
    for direction, matrix in (("image", scores), ("text", scores.T)):
        # 1 = best, the right one counted too. "Not less" rather than "greater or equal", for the sake of NaN.
        ranks = (~(matrix < right[:, None])).sum(axis=1)
        for k in ks:
            results[f"{direction}_recall_at_{k}"] = float((ranks <= k).mean())
    return results
