"""Retrieval of images by text: an index of embedded images, and their match scores with any text."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT = 1  # of an index on the disk
MANIFEST = "index.json"
LOCK = ".lock"
# What an index writes to its folder. Other files are not its own, and it leaves them alone.
OWN_FILES = re.compile(rf"({re.escape(MANIFEST)}|shard-[0-9a-f]{{32}}\.safetensors)(\.unfinished)?|{re.escape(LOCK)}")
# Of a region record, what the model makes use of, and its number of dimensions.
REGION_DIMENSIONS = {"features": 2, "boxes": 2, "width": 0, "height": 0}
MIN_IMAGES_PER_BLOCK = 16  # that are scored together, however many texts there are


class ImageMatch(NamedTuple):
    """An image that was found: its id, and the probability that it matches the text."""

    image_id: str
    score: float


class IndexReport(NamedTuple):
    """What became of the images that were to be indexed: how many are new, have other regions than before, were there
    already, or were left out for having no regions; and how many others were removed."""

    num_added: int
    num_replaced: int
    num_unchanged: int
    num_without_regions: int
    num_removed: int = 0


class _Image(NamedTuple):
    image_id: str
    region_digest: str
    num_regions: int


@dataclass
class _Shard:
    """
    Embedded images.

    Args:
        images: Those with the fewest regions first.
        region_embeds: `(positions, hidden_size)`: of each image the whole image and its regions, without padding. None
            where they are in a file.
        file_name: Of the file, if there is one.
        is_verified: The file was read once and is not damaged.
    """

    images: list[_Image]
    region_embeds: torch.Tensor | None = None
    file_name: str | None = None
    is_verified: bool = False


class _IndexFolder:
    """
    An index on the disk: files of embedded images, which are never changed, and a manifest that says which of them
    count. Replacing the manifest is the one step that takes an index from one state to the next.

    Args:
        path: The folder.
        settings: What the embedded images depend on besides the images; an index of other settings is refused.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.settings = {"format": FORMAT, **settings}

    def exists(self) -> bool:
        return (self.path / MANIFEST).exists()

    def check_files(self):
        """
        Raises:
            ValueError: there is no index, but other files are.
        """
        foreign = [path.name for path in self.path.glob("*") if not OWN_FILES.fullmatch(path.name)]
        if foreign and not self.exists():
            raise ValueError(f"{self.path}: expected an index, or an empty folder, got one with {_some(foreign)}.")

    def begin(self):
        """
        Writes an empty index, unless there is one.

        Raises:
            ValueError: there are other files instead.
        """
        if not self.exists():
            self.check_files()
            with self.lock():
                if not self.exists():  # still
                    self.commit([])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other programs from changing the index. Waits for one that is changing it, and says so."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning(f"Another program is changing the index in {self.path}: waiting until it is done.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def read(self, known: Sequence[_Shard] = ()) -> list[_Shard]:
        """
        The shards, without their embedded images.

        Args:
            known: Shards that were read before, of which only those are read that are new.

        Raises:
            ValueError: the index is damaged, or was made otherwise.
        """
        path = self.path / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            manifest = json.loads(text)
            file_names = [str(name) for name in manifest["shards"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error
        known_by_name = {shard.file_name: shard for shard in known}
        for name, expected in self.settings.items():
            if manifest.get(name) != expected:
                what = "another model" if name == "fingerprint" else f"another `{name}`"
                raise ValueError(
                    f"{self.path} holds an index of {what}: expected `{name}` {expected}, got {manifest.get(name)}. "
                    "Give another folder, or remove this one to index anew."
                )
        try:
            return [known_by_name.get(name) or self._read_header(name) for name in file_names]
        except ValueError:
            # Another program may have put a shard into a larger one since the manifest was read.
            if path.read_text(encoding="utf-8") == text:
                raise
        return self.read(known)

    def _read_header(self, file_name: str) -> _Shard:
        path = self.path / file_name
        try:
            with safe_open(path, framework="pt") as file:
                images = [_Image(*image) for image in json.loads(file.metadata()["images"])]
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error
        return _Shard(images, file_name=file_name)

    def read_region_embeds(self, shard: _Shard) -> torch.Tensor:
        path = self.path / shard.file_name
        try:
            data = path.read_bytes()
        except OSError as error:
            if shard.file_name not in (self.path / MANIFEST).read_text(encoding="utf-8"):
                raise ValueError(f"Another program has changed the index in {self.path}: try again.") from error
            raise _damaged(path, error) from error
        if not shard.is_verified and _file_name(data) != shard.file_name:
            raise _damaged(path, "its contents are not those that were written")
        shard.is_verified = True
        return load_safetensors(data)["region_embeds"]

    def write(self, shard: _Shard) -> _Shard:
        """Writes the file of a shard, which counts once the manifest names it."""
        # One entry alone: the order of several is not always the same.
        metadata = {"images": json.dumps(shard.images, ensure_ascii=False)}
        data = save_safetensors({"region_embeds": shard.region_embeds.contiguous()}, metadata)
        file_name = _file_name(data)
        _write(self.path / file_name, data)
        return replace(shard, region_embeds=None, file_name=file_name)

    def commit(self, shards: Sequence[_Shard]):
        """Makes these the shards of the index, all at once."""
        manifest = {**self.settings, "shards": [shard.file_name for shard in shards]}
        _write(self.path / MANIFEST, json.dumps(manifest, indent=1).encode())

    def remove_leftovers(self, shards: Sequence[_Shard]):
        """Removes the files of all other shards: those that count no more, and what was written and never counted."""
        kept = {MANIFEST, LOCK} | {shard.file_name for shard in shards}
        for path in self.path.iterdir():
            if path.name not in kept and OWN_FILES.fullmatch(path.name):
                path.unlink()


def _damaged(path: Path, reason: Any) -> ValueError:
    return ValueError(f"{path} is missing or damaged ({reason}). Remove its folder to index anew.")


def _file_name(data: bytes) -> str:
    """Names a file by its contents."""
    return f"shard-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"


def _write(path: Path, data: bytes):
    """Writes under another name first, so that a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _weights_fingerprint(model: PreTrainedModel) -> str:
    """Of all in a model that decides on embedded regions."""
    digest = hashlib.sha256(json.dumps([model.config.hidden_act, model.config.layer_norm_eps]).encode())
    for name, weight in sorted(model.interbert.embeddings.image.state_dict().items()):
        digest.update(f"{name}{weight.dtype}{tuple(weight.shape)}".encode())
        digest.update(weight.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _region_arrays(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """
    All in a region record that decides on its embedded regions, float32.

    Raises:
        ValueError: something is missing, or no numbers as expected.
    """
    arrays = {}
    for name, num_dimensions in REGION_DIMENSIONS.items():
        if name not in record:
            raise ValueError(f"image_id {record['image_id']}: expected {', '.join(REGION_DIMENSIONS)}, got no {name}.")
        value = record[name]
        if isinstance(value, torch.Tensor):
            value = value.detach().float().cpu()
        try:
            array = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            array = None
        # Of no regions a list has one dimension. None would be NaN.
        if value is None or array is None or (array.size and array.ndim != num_dimensions):
            raise ValueError(
                f"image_id {record['image_id']}: expected {name} that are numbers of {num_dimensions} dimensions, got "
                f"{value!r:.80}."
            )
        arrays[name] = array
    return arrays


def _region_digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name in REGION_DIMENSIONS:
        digest.update(f"{arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def match_log_odds(
    model: PreTrainedModel,
    text_inputs: Mapping[str, torch.Tensor],
    region_embeds: torch.Tensor,
    region_attention_mask: torch.Tensor,
    autocast_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    Scores each of some texts against each of some images, in one pass.

    Args:
        model: A model with the match head `itm_head`, in evaluation mode.
        text_inputs: `input_ids` and the like, `(texts, tokens)`, on the model's device.
        region_embeds: `(images, regions + 1, hidden_size)`, see [`InterBERTModel.embed_regions`].
        region_attention_mask: `(images, regions)`, 1 = region, 0 = padding.
        autocast_dtype: Of the encoder. By default it computes in the dtype of its weights.

    Returns:
        float32 tensor of shape `(texts, images)`: the log-odds of a match, `itm_logits[…, 0] - itm_logits[…, 1]`.
        (Log-odds rather than probabilities, since float32 probabilities near 1 would tie.)
    """
    num_texts, num_images = len(text_inputs["input_ids"]), len(region_embeds)
    pairs = {name: tensor.repeat_interleave(num_images, dim=0) for name, tensor in text_inputs.items()}
    pairs["region_embeds"] = region_embeds.repeat(num_texts, 1, 1)
    pairs["region_attention_mask"] = region_attention_mask.repeat(num_texts, 1)
    device_type = region_embeds.device.type
    with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        outputs = model.interbert(**pairs, pooled_only=True, return_dict=True)
    # Half precision has so few digits that pairs would tie.
    with torch.autocast(device_type, enabled=False):
        dtype = model.itm_head.classifier.weight.dtype
        logits = model.itm_head(outputs.text_pooler_output.to(dtype), outputs.vision_pooler_output.to(dtype)).float()
    return (logits[:, 0] - logits[:, 1]).view(num_texts, num_images)


class InterBERTRetriever:
    """
    Finds images by text with the match head of InterBERT: the best ones ([`~InterBERTRetriever.search`]), or all whose
    match score is above a threshold ([`~InterBERTRetriever.recall`]). The scores are those of
    [`InterBERTForImageRetrieval`]. What no text has a say in, the embedded regions of each image, is computed once and
    kept, in memory or in a folder.

    An index in a folder is there whenever it is opened again. Killed while it is being written, it is what it was
    before the last unfinished step, and the same call of [`~InterBERTRetriever.index`] goes on from there. Its images
    are read shard by shard and never all at once. Several programs may have it open: one at a time may change it, and
    the others find what it has changed.

    Args:
        model ([`InterBERTForImageRetrieval`] or [`InterBERTForPreTraining`]):
            On the device that is to compute; it is put into evaluation mode. Its image embeddings must not be trained
            any further, as the index would not follow.
        processor ([`InterBERTProcessor`]):
            That of the model.
        folder (`str` or `os.PathLike`, *optional*):
            Keeps the index: opened if it holds one, begun if it is empty or not there. By default the index is kept in
            memory.
        batch_size (`int`, *optional*, defaults to 256):
            Pairs that are scored, and images that are embedded, at a time.
        max_length (`int`, *optional*):
            Texts are cut to this number of tokens. By default the processor has the say.
        max_regions (`int`, *optional*):
            Of each image, this many regions are used. By default the processor has the say.
        images_per_shard (`int`, *optional*, defaults to 256):
            Images that are kept together: in one file, and read, written and given to a process at a time.
        autocast_dtype (`torch.dtype`, *optional*):
            Scores with autocast to this dtype, `torch.bfloat16` for instance, but for the match head. The index does
            not depend on it. By default all is computed in the dtype of the weights.
        progress_bar (`Callable`, *optional*):
            `tqdm`, or what takes the same `total`, `desc` and `unit`. By default nothing is shown.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            Processes that share the work, and `folder`. All of them make the same calls, and get the same results. No
            other program may change the index between their calls.

    Raises:
        `ValueError`: an argument is out of range, the model has no match head, or `folder` holds a damaged index, one
        of another model, or other files alone.

    Example:

    ```python
    >>> retriever = InterBERTRetriever(model, processor, folder="index")
    >>> retriever.index(load_region_dataset("org/my-regions", "validation"))
    >>> retriever.search("two dogs on a beach", top_k=5)
    >>> retriever.recall(["dogs", "a beach"], threshold=0.6)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        folder: str | os.PathLike | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        max_regions: int | None = None,
        images_per_shard: int = 256,
        autocast_dtype: torch.dtype | None = None,
        progress_bar: Callable | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ):
        if not hasattr(model, "itm_head"):
            raise ValueError(
                f"Retrieval needs a model with a match head, such as InterBERTForImageRetrieval, got "
                f"{type(model).__name__}."
            )
        for name, value in (
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("max_regions", max_regions),
            ("images_per_shard", images_per_shard),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if process_group is not None and folder is None:
            raise ValueError("Processes of a `process_group` share an index in a `folder`, which is None.")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_length = max_length
        limits = [limit for limit in (max_regions, processor.max_regions) if limit is not None]
        self.max_regions = min(limits, default=None)
        self.images_per_shard = images_per_shard
        self.autocast_dtype = autocast_dtype
        self.progress_bar = progress_bar
        self.process_group = process_group
        self._process_index, self._num_processes = 0, 1
        if process_group is not None:
            self._process_index = torch.distributed.get_rank(process_group)
            self._num_processes = torch.distributed.get_world_size(process_group)

        self._settings = {"fingerprint": _weights_fingerprint(model), "max_regions": self.max_regions}
        self._folder = None if folder is None else _IndexFolder(folder, self._settings)
        self._shards: list[_Shard] = []
        self._region_digests: dict[str, str] = {}
        if self._folder is not None:
            if self._process_index == 0:
                self._folder.begin()
            self._gather(None)  # nobody reads before the first process has written
            self._open()

    @classmethod
    def load(
        cls, folder: str | os.PathLike, model: PreTrainedModel, processor: ProcessorMixin, **kwargs
    ) -> "InterBERTRetriever":
        """
        Opens the index of a folder, where further images will be kept too.

        Args:
            folder: As [`~InterBERTRetriever.save`] or a retriever with this `folder` left it.
            model, processor, kwargs: As for a new retriever.

        Raises:
            `ValueError`: there is no index, it is damaged, or it is one of another model.
        """
        if not _IndexFolder(folder, {}).exists():
            raise ValueError(f"Expected an index in {folder}, got a folder without {MANIFEST}, or none.")
        return cls(model, processor, folder=folder, **kwargs)

    def save(self, folder: str | os.PathLike):
        """
        Writes the index to a folder. An index that is there is replaced, in one step. The retriever itself goes on
        keeping its images where it did.
        """
        target = _IndexFolder(folder, self._settings)
        is_own = self._folder is not None and target.path.resolve() == self._folder.path.resolve()
        if self._process_index == 0 and not is_own:
            target.check_files()
            # No other program removes a shard that is still to be copied.
            with target.lock(), nullcontext() if self._folder is None else self._folder.lock():
                self._open()
                shards = [
                    target.write(_Shard(shard.images, region_embeds=self._region_embeds(shard)))
                    for shard in self._shards
                ]
                target.commit(shards)
                target.remove_leftovers(shards)
        self._gather(None)

    # What other programs have changed since this one last searched or changed the index is not looked for here, in
    # what may be asked often.
    def __len__(self) -> int:
        return len(self._region_digests)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._region_digests

    @property
    def image_ids(self) -> list[str]:
        """Of all images of the index, in no particular order."""
        return list(self._region_digests)

    # ---------------------------------------------------------------- images

    def index(
        self, records: Mapping[str, Any] | Sequence[Mapping[str, Any]], remove_others: bool = False
    ) -> IndexReport:
        """
        Embeds images and keeps them. Those that are there already are left as they are, or replaced if their regions
        are others now: what was stopped goes on where it was when the same images are given again.

        Args:
            records: A region record, or several, as the processor takes them, each with its `image_id`. They are read
                twice, first for the ids alone, and not kept.
            remove_others: First removes the images that are not among these: the index has no others afterwards.

        Returns:
            How many images were added, replaced, unchanged, left out for having no regions, and removed.

        Raises:
            `ValueError`: an id is missing or comes twice (nothing is embedded then), or regions are not as the
            processor takes them (images before these may be in the index).
        """
        records = _as_records(records)
        image_ids = self._check_image_ids(records)
        with self._changing():
            others = self._region_digests.keys() - image_ids if remove_others else set()
            if self._process_index == 0 and others:
                self._commit([], others)
            return self._index(records)._replace(num_removed=len(others))

    def _index(self, records: Sequence[Mapping[str, Any]]) -> IndexReport:
        starts = range(0, len(records), self.images_per_shard)
        reports = []
        with self._show_progress(len(records), "Embedding images", "image") as advance:
            for first in range(0, len(starts), self._num_processes):
                chunk = None
                if first + self._process_index < len(starts):
                    start = starts[first + self._process_index]
                    rows = range(start, min(start + self.images_per_shard, len(records)))
                    chunk = self._embed_chunk([records[row] for row in rows])
                chunks = [chunk for chunk in self._gather(chunk) if chunk is not None]
                added = [shard for shard, _, _ in chunks if shard is not None]
                removed = {image_id for _, gone, _ in chunks for image_id in gone}
                if self._process_index == 0 and (added or removed):
                    self._commit(added, removed)
                reports += [report for _, _, report in chunks]
                advance(sum(sum(report) for _, _, report in chunks))
        return IndexReport(*(sum(numbers) for numbers in zip((0, 0, 0, 0, 0), *reports, strict=True)))

    def add(self, records: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> IndexReport:
        """
        Embeds new images and keeps them, as [`~InterBERTRetriever.index`] does.

        Raises:
            `ValueError`: an image is in the index already, and nothing is added; or as in `index`.
        """
        records = _as_records(records)
        self._check_image_ids(records)
        with self._changing():
            known = {record["image_id"] for record in records} & self._region_digests.keys()
            if known:
                raise ValueError(
                    f"Expected images that are not in the index, got {len(known)} that are: {_some(known)}."
                )
            return self._index(records)

    def remove(self, image_ids: str | Collection[str]):
        """
        Removes images from the index, all at once.

        Args:
            image_ids: One, or several.

        Raises:
            `ValueError`: an image is not in the index, and nothing is removed.
        """
        removed = {image_ids} if isinstance(image_ids, str) else set(image_ids)
        with self._changing():
            unknown = removed - self._region_digests.keys()
            if unknown:
                raise ValueError(
                    f"Expected images that are in the index, got {len(unknown)} that are not: {_some(unknown)}."
                )
            if self._process_index == 0 and removed:
                self._commit([], removed)

    def _check_image_ids(self, records: Sequence[Mapping[str, Any]]) -> set[str]:
        image_ids = [record.get("image_id") for record in records]
        for row, image_id in enumerate(image_ids):
            if not isinstance(image_id, str) or not image_id:
                raise ValueError(f"records[{row}]: expected an `image_id` that is a text, got {image_id!r}.")
        repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
        if repeated:
            raise ValueError(
                f"Expected every `image_id` once, got {len(repeated)} that come more often: {_some(repeated)}."
            )
        return set(image_ids)

    def _embed_chunk(self, records: Sequence[Mapping[str, Any]]) -> tuple[_Shard | None, set[str], IndexReport]:
        """Of the images of a shard: those that were embedded, the ids that these replace, and a report."""
        chosen, digests, removed = [], [], set()
        num_unchanged = num_without_regions = num_replaced = 0
        for record in records:
            image_id, arrays = record["image_id"], _region_arrays(record)
            for name in ("features", "boxes"):
                arrays[name] = arrays[name][: self.max_regions]
            if len(arrays["features"]) == 0:
                num_without_regions += 1
                if image_id in self._region_digests:
                    removed.add(image_id)
                continue
            digest = _region_digest(arrays)
            known_digest = self._region_digests.get(image_id)
            if known_digest == digest:
                num_unchanged += 1
                continue
            if known_digest is not None:
                num_replaced += 1
                removed.add(image_id)
            chosen.append({**record} | {name: arrays[name] for name in ("features", "boxes")})
            digests.append(digest)
        shard = self._store(self._embed(chosen, digests)) if chosen else None
        report = IndexReport(len(chosen) - num_replaced, num_replaced, num_unchanged, num_without_regions)
        return shard, removed, report

    @torch.inference_mode()
    def _embed(self, records: Sequence[Mapping[str, Any]], digests: Sequence[str]) -> _Shard:
        self.model.eval()
        order = sorted(range(len(records)), key=lambda row: len(records[row]["features"]))
        images, region_embeds = [], []
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = self.processor(regions=[records[row] for row in rows], return_tensors="pt").to(self.model.device)
            with torch.autocast(self.model.device.type, enabled=False):
                embedded = self.model.interbert.embed_regions(**inputs)  # (batch, regions + 1, hidden_size)
            mask = inputs["region_attention_mask"]
            region_embeds.append(embedded[nn.functional.pad(mask, (1, 0), value=1).bool()].cpu())
            for row, num_regions in zip(rows, mask.sum(dim=1).tolist(), strict=True):
                images.append(_Image(records[row]["image_id"], digests[row], num_regions))
        return _Shard(images, torch.cat(region_embeds))

    def _store(self, shard: _Shard) -> _Shard:
        return shard if self._folder is None else self._folder.write(shard)

    def _region_embeds(self, shard: _Shard) -> torch.Tensor:
        return shard.region_embeds if self._folder is None else self._folder.read_region_embeds(shard)

    def _split(self, shard: _Shard) -> tuple[torch.Tensor, ...]:
        """The embedded regions `(regions + 1, hidden_size)` of each image."""
        return self._region_embeds(shard).split([image.num_regions + 1 for image in shard.images])

    def _combine(self, shards: Sequence[_Shard], without: Collection[str] = frozenset()) -> _Shard:
        """One shard of the images of several, some of them left out."""
        embedded = [
            pair
            for shard in shards
            for pair in zip(shard.images, self._split(shard), strict=True)
            if pair[0].image_id not in without
        ]
        embedded.sort(key=lambda pair: pair[0].num_regions)
        images, region_embeds = zip(*embedded, strict=True)
        return self._store(_Shard(list(images), torch.cat(region_embeds)))

    def _commit(self, added: Sequence[_Shard], removed: Collection[str]):
        """Removes images and adds shards, in one step."""
        shards = []
        for shard in self._shards:
            num_removed = sum(image.image_id in removed for image in shard.images) if removed else 0
            if num_removed == 0:
                shards.append(shard)
            elif num_removed < len(shard.images):
                shards.append(self._combine([shard], without=removed))
        for shard in added:
            # Images that come one by one would each have a file.
            if shards and len(shards[-1].images) + len(shard.images) <= self.images_per_shard:
                shard = self._combine([shards.pop(), shard])
            shards.append(shard)
        if self._folder is not None:
            self._folder.commit(shards)
        self._shards = shards
        for image_id in removed:
            del self._region_digests[image_id]
        self._region_digests |= {image.image_id: image.region_digest for shard in added for image in shard.images}

    def _open(self):
        """Takes over what is in the folder, which other programs may have changed."""
        if self._folder is not None:
            self._shards = self._folder.read(known=self._shards)
            self._region_digests = {
                image.image_id: image.region_digest for shard in self._shards for image in shard.images
            }

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change of the index, which no other program makes one meanwhile."""
        is_first = self._folder is not None and self._process_index == 0
        with self._folder.lock() if is_first else nullcontext():
            self._gather(None)  # the first process has the lock
            self._open()
            yield
            self._gather(None)  # no process writes any more
            if is_first:
                self._folder.remove_leftovers(self._shards)
            else:
                self._open()

    # ---------------------------------------------------------------- texts

    def search(self, text: str | Sequence[str], top_k: int = 10) -> list[ImageMatch] | list[list[ImageMatch]]:
        """
        The images that match a text best.

        Args:
            text: One text, or several.
            top_k: Number of images for each text; all of them, if the index has fewer.

        Returns:
            The image ids with their match scores in [0, 1], highest first; images of the same score by their ids. A
            list for each text where there are several.

        Raises:
            `ValueError`: a text is empty, there is none, `top_k` is smaller than 1, a file of the index is damaged, or
            another program has changed it meanwhile.
        """
        return self._retrieve(text, -1.0, top_k)

    def recall(
        self, topic: str | Sequence[str], threshold: float = 0.6, top_k: int | None = None
    ) -> list[ImageMatch] | list[list[ImageMatch]]:
        """
        All images that match a topic with a score above a threshold (paper, on topics of products: 0.6).

        Args:
            topic: One topic, or several.
            threshold: In [0, 1].
            top_k: At most so many images for each topic, the best ones. By default all.

        Returns, Raises: As [`~InterBERTRetriever.search`]; a threshold outside [0, 1] is a `ValueError`.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be within [0, 1], got {threshold}.")
        return self._retrieve(topic, threshold, top_k)

    def _retrieve(
        self, text: str | Sequence[str], threshold: float, top_k: int | None
    ) -> list[ImageMatch] | list[list[ImageMatch]]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        if not isinstance(text, Sequence):
            raise ValueError(f"Expected a text or a list of texts, got {text!r}.")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("Expected at least one text, got none.")
        for number, item in enumerate(texts):
            if not isinstance(item, str) or not item.strip():
                raise ValueError(f"Expected texts that are not empty, got {item!r} as number {number + 1}.")
        texts_per_block = max(1, min(len(texts), self.batch_size // MIN_IMAGES_PER_BLOCK))
        text_blocks = self._text_blocks(texts, texts_per_block)
        if self.process_group is None:  # processes that share an index must all see the same
            self._open()
        images_per_block = max(1, self.batch_size // texts_per_block)
        own_shards = self._shards[self._process_index :: self._num_processes]
        num_pairs = len(texts) * sum(len(shard.images) for shard in own_shards)
        found: list[list[tuple[float, str, float]]] = [[] for _ in texts]  # in ascending order: the best first
        with self._show_progress(num_pairs, "Scoring pairs", "pair") as advance:
            for shard in own_shards:
                log_odds = self._score_shard(shard, text_blocks, len(texts), images_per_block, advance)
                scores = log_odds.double().sigmoid()
                for row, column in (scores > threshold).nonzero().tolist():
                    image_id = shard.images[column].image_id
                    found[row].append((-log_odds[row, column].item(), image_id, scores[row, column].item()))
                if top_k is not None:
                    found = [sorted(matches)[:top_k] for matches in found]
        matches_by_process = self._gather(found)
        results = []
        for row in range(len(texts)):
            matches = sorted(match for matches in matches_by_process for match in matches[row])
            results.append([ImageMatch(image_id, score) for _, image_id, score in matches[:top_k]])
        return results[0] if isinstance(text, str) else results

    def _text_blocks(
        self, texts: Sequence[str], texts_per_block: int
    ) -> list[tuple[list[int], Mapping[str, torch.Tensor]]]:
        """Texts of similar lengths together, so that next to nothing is padding: which, and as inputs of the model."""
        masks = self.processor(text=texts, truncation=True, max_length=self.max_length)["attention_mask"]
        order = sorted(range(len(texts)), key=lambda row: sum(masks[row]))
        blocks = []
        for start in range(0, len(texts), texts_per_block):
            rows = order[start : start + texts_per_block]
            inputs = self.processor(
                text=[texts[row] for row in rows], truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            blocks.append((rows, inputs.to(self.model.device)))
        return blocks

    @torch.inference_mode()
    def _score_shard(
        self,
        shard: _Shard,
        text_blocks: Sequence[tuple[list[int], Mapping[str, torch.Tensor]]],
        num_texts: int,
        images_per_block: int,
        advance: Callable[[int], Any],
    ) -> torch.Tensor:
        """Log-odds of a match of all texts with the images of a shard, float32 `(num_texts, images)` on the CPU."""
        self.model.eval()
        device = self.model.device
        images = self._split(shard)
        log_odds = torch.zeros(num_texts, len(images), device=device)
        for start in range(0, len(images), images_per_block):
            block = images[start : start + images_per_block]
            region_embeds = nn.utils.rnn.pad_sequence(block, batch_first=True).to(device)
            num_positions = torch.tensor([len(image) for image in block], device=device)
            mask = (torch.arange(1, region_embeds.shape[1], device=device) < num_positions[:, None]).long()
            for rows, text_inputs in text_blocks:
                log_odds[rows, start : start + len(block)] = match_log_odds(
                    self.model, text_inputs, region_embeds, mask, self.autocast_dtype
                )
                advance(len(rows) * len(block))
        log_odds = log_odds.cpu()
        if not log_odds.isfinite().all():
            column = int((~log_odds.isfinite()).any(dim=0).nonzero()[0])
            raise ValueError(f"Expected finite match scores, got others for image {shard.images[column].image_id}.")
        return log_odds

    # ---------------------------------------------------------------- processes

    def _gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order. None goes on before all have come here."""
        if self.process_group is None:
            return [value]
        values = [None] * self._num_processes
        torch.distributed.all_gather_object(values, value, group=self.process_group)
        return values

    @contextmanager
    def _show_progress(self, total: int, description: str, unit: str) -> Iterator[Callable[[int], Any]]:
        """Gives a function that takes how much more is done."""
        if self.progress_bar is None:
            yield lambda amount: None
        else:
            with self.progress_bar(total=total, desc=description, unit=unit) as bar:
                yield bar.update


def _as_records(records: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(records, Mapping):
        return [records]
    if not (hasattr(records, "__getitem__") and hasattr(records, "__len__")):
        raise ValueError(
            "Expected a region record, a list of them, or a dataset that is read by number, got "
            f"{type(records).__name__}."
        )
    return records


def _some(image_ids: Collection[str]) -> str:
    """A few of them, for a message."""
    return ", ".join(sorted(image_ids)[:5]) + (", …" if len(image_ids) > 5 else "")
