"""
Pipelines of InterBERT, which `transformers.pipeline` opens by the task of a checkpoint: answers to questions, matches
of texts and images, choices, features.

    answerer = pipeline("visual-question-answering", model="org/interbert-base-vqa2", trust_remote_code=True)
    answerer(image="kitchen.jpg", question="What is on the table?")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .region_extractors import detector_settings, read_pictures

logger = logging.get_logger(__name__)


class RegionPipeline(ChunkPipeline):
    """
    What the pipelines of InterBERT have in common: the images that they take, and the batches that pairs of a text and
    an image go through the model in, those of several inputs together.

    Args:
        model ([`PreTrainedModel`]):
            An InterBERT, in evaluation mode.
        processor ([`InterBERTProcessor`]):
            That of the model.
        region_dataset (`Sequence[Mapping[str, Any]]`, *optional*):
            Images that may be given by their ids: the rows of a region dataset, each with its `image_id`, as a
            [`datasets.Dataset`], a [`RegionDataset`] or a list.
        batch_size (`int`, *optional*, defaults to 16):
            Pairs of a text and an image that go through the model at a time.
        kwargs: See [`Pipeline`], for `device` and others.
    """

    _load_processor = True
    _load_tokenizer = False  # the processor has it
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(
        self,
        model: PreTrainedModel,
        region_dataset: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 16,
        **kwargs,
    ):
        super().__init__(model=model, batch_size=batch_size, **kwargs)
        named, ours = model.config.region_detector, self.processor.region_detector
        if ours is None and named is not None:
            self.processor = copy.copy(self.processor)  # the caller's stays as it is
            self.processor.region_detector = detector_settings(named)
        elif named is not None and detector_settings(named) != ours:
            logger.warning(f"Pictures go through the detector of the processor, {ours}, not the model's, {named}.")
        self.region_dataset = region_dataset
        self._rows: dict[str, int] | None = None  # by image id, once one is asked for

    def __call__(self, inputs: Any, **kwargs):
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model and the processor, so that [`pipeline`] opens them again."""
        super().save_pretrained(save_directory, **kwargs)  # which saves the tokenizer alone
        self.processor.save_pretrained(os.fspath(save_directory), **kwargs)

    def _sanitize_parameters(self, **kwargs) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ValueError(f"{type(self).__name__}: unexpected arguments {sorted(kwargs)}.")
        return {}, {}, {}

    def _read_image(self, image: Any) -> Mapping[str, Any]:
        """The regions of an image: as they are given, those of an image id, or what the detector finds."""
        if isinstance(image, Mapping):
            return image
        if self.region_dataset is not None and isinstance(image, str):
            if self._rows is None:
                self._rows = {image_id: row for row, image_id in enumerate(_image_ids(self.region_dataset))}
            if image in self._rows:
                return self.region_dataset[self._rows[image]]
        num_images = "no" if self.region_dataset is None else f"{len(self.region_dataset):,}"
        ids = f"the id of an image in `region_dataset`, which has {num_images} images"
        if self.processor.region_detector is None:
            raise ValueError(
                f"`image`: expected the regions of an image, a dict with features, boxes, width and height, or {ids}, "
                f"got {image!r:.80}. The checkpoint names no detector for pictures."
            )
        try:
            (picture,) = read_pictures([image])
        except ValueError as error:
            raise ValueError(f"`image`: expected regions, a picture, or {ids}. {error}") from error
        return self.processor.detect_regions([picture], device=self.device)[0]

    def _pairs(self, image: Any, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> Iterator[dict]:
        """The model's inputs of each text with the image, one by one."""
        images = self.processor(regions=self._read_image(image), return_tensors="pt")
        for index, text in enumerate(texts):
            text_pair = None if text_pairs is None else text_pairs[index]
            inputs = self.processor(text=text, text_pair=text_pair, return_tensors="pt")
            yield {**inputs, **images, "is_last": index == len(texts) - 1}

    def _run_model(self, model_inputs: dict[str, Any], **kwargs) -> tuple[Any, dict[str, Any]]:
        """The outputs of the model, and what of the inputs goes on beside them."""
        inputs = {name: value for name, value in model_inputs.items() if name != "is_last"}
        return self.model(**inputs, **kwargs), {"is_last": model_inputs["is_last"]}


def _one_by_one(image: Any, **texts: Any) -> Any:
    """
    The inputs of a call, one dict for each image: one image with its texts, several images with the same texts, or,
    where no text is given beside them, dicts that have both.
    """
    given = {name: text for name, text in texts.items() if text is not None}
    if not given:
        return image
    if isinstance(image, (list, tuple)):
        return [_with_texts(item, given) for item in image]
    return _with_texts(image, given)


def _with_texts(image: Any, texts: dict[str, Any]) -> dict[str, Any]:
    """An input of an image, or of a dict that has one, with what it lacks."""
    return {**texts, **image} if isinstance(image, Mapping) and "image" in image else {"image": image, **texts}


def _image_ids(region_dataset: Any) -> Sequence[str]:
    """Without reading the regions, where that can be done."""
    if hasattr(region_dataset, "image_ids"):
        return region_dataset.image_ids
    if hasattr(region_dataset, "column_names"):
        return region_dataset["image_id"]
    return [record["image_id"] for record in region_dataset]


def _read_input(item: Any, names: tuple[str, ...]) -> list[Any]:
    """The values of these names of one input."""
    if not isinstance(item, Mapping) or any(item.get(name) is None for name in names):
        is_dict = isinstance(item, Mapping)
        given = sorted(name for name in item if item[name] is not None) if is_dict else type(item).__name__
        raise ValueError(f"Expected an input with {', '.join(names)}, got {given}.")
    return [item[name] for name in names]


def _check_text(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{name}`: expected a text, got {text!r}.")
    return text


def _check_texts(name: str, texts: Any) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) == 0:
        raise ValueError(f"`{name}`: expected a list of at least one text, got {texts!r}.")
    return [_check_text(f"{name}[{index}]", text) for index, text in enumerate(texts)]


class VisualQuestionAnsweringPipeline(RegionPipeline):
    """
    Answers questions about images ([`InterBERTForVQA`]): task `visual-question-answering`.

    ```python
    >>> answerer = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    >>> answerer(image="beach.jpg", question="How many dogs are there?", top_k=2)
    [{'score': 0.93, 'answer': '2'}, {'score': 0.04, 'answer': '3'}]
    ```
    """

    def __call__(self, image: Any, question: str | None = None, **kwargs):
        """
        Args:
            image (`PIL.Image.Image`, `str`, `np.ndarray`, `Mapping[str, Any]`, or a list of them):
                A picture, its path, URL or base64, whose regions the detector of the checkpoint finds; the regions as
                [`InterBERTProcessor`] takes them, a row of a region dataset for instance; or an image id of
                `region_dataset`. Without `question`: a dict `{"image": ..., "question": ...}`, or a
                list, a generator or a torch dataset of them.
            question (`str`, *optional*):
                Asked of every image.
            top_k (`int`, *optional*, defaults to 5):
                Number of answers, the best first.
            batch_size (`int`, *optional*):
                Other than that of the pipeline.

        Returns:
            `list[dict]` for one image, otherwise one for each: `answer`, and `score` in [0, 1], which does not depend
            on those of the other answers.
        """
        return super().__call__(_one_by_one(image, question=question), **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs) -> tuple[dict, dict, dict]:
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be a number of at least 1, got {top_k!r}.")
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, forward, postprocess if top_k is None else {"top_k": top_k}

    def preprocess(self, item: Any) -> Iterator[dict]:
        image, question = _read_input(item, ("image", "question"))
        yield from self._pairs(image, [_check_text("question", question)])

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        outputs, others = self._run_model(model_inputs)
        return {"logits": outputs.logits, **others}

    def postprocess(self, model_outputs: list[dict[str, Any]], top_k: int = 5) -> list[dict[str, Any]]:
        logits = model_outputs[0]["logits"][0].float()
        # By the logits: probabilities near 1 tie.
        best = logits.topk(min(top_k, len(logits))).indices
        answers = self.model.config.id2label
        return [{"score": logits[index].sigmoid().item(), "answer": answers[index]} for index in best.tolist()]


class ImageTextMatchingPipeline(RegionPipeline):
    """
    Says how well texts and images match ([`InterBERTForImageRetrieval`], or a pretraining checkpoint as it is): task
    `zero-shot-image-classification`.

    ```python
    >>> matcher = pipeline("zero-shot-image-classification", model=checkpoint, trust_remote_code=True)
    >>> matcher(image="beach.jpg", candidate_labels=["two dogs on a beach", "a bowl of fruit"])
    [{'score': 0.98, 'label': 'two dogs on a beach'}, {'score': 0.01, 'label': 'a bowl of fruit'}]
    ```
    """

    def __call__(self, image: Any, candidate_labels: Sequence[str] | None = None, **kwargs):
        """
        Args:
            image (`PIL.Image.Image`, `str`, `np.ndarray`, `Mapping[str, Any]`, or a list of them):
                A picture, its path, URL or base64, whose regions the detector of the checkpoint finds; the regions as
                [`InterBERTProcessor`] takes them, a row of a region dataset for instance; or an image id of
                `region_dataset`. Without `candidate_labels`: a dict `{"image": ...,
                "candidate_labels": [...]}`, or a list, a generator or a torch dataset of them.
            candidate_labels (`Sequence[str]`, *optional*):
                Texts that every image is matched with, as they are.
            batch_size (`int`, *optional*):
                Other than that of the pipeline.

        Returns:
            `list[dict]` for one image, otherwise one for each, the best match first: `label`, and `score`, the
            probability in [0, 1] that text and image match, which does not depend on the other texts.
        """
        return super().__call__(_one_by_one(image, candidate_labels=candidate_labels), **kwargs)

    def preprocess(self, item: Any) -> Iterator[dict]:
        image, labels = _read_input(item, ("image", "candidate_labels"))
        labels = _check_texts("candidate_labels", labels)
        for label, pair in zip(labels, self._pairs(image, labels), strict=True):
            yield {"label": label, **pair}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        label = model_inputs.pop("label")
        outputs, others = self._run_model(model_inputs)
        return {"logits": outputs.itm_logits.float(), "label": label, **others}

    def postprocess(self, model_outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        logits = torch.cat([output["logits"] for output in model_outputs])  # (labels, 2)
        order = (logits[:, 0] - logits[:, 1]).argsort(descending=True, stable=True).tolist()
        scores = logits.softmax(dim=-1)[:, 0].tolist()
        return [{"score": scores[index], "label": model_outputs[index]["label"]} for index in order]


class VisualMultipleChoicePipeline(RegionPipeline):
    """
    Chooses one of several answers to a question about an image ([`InterBERTForMultipleChoice`]): task
    `visual-question-answering`, with the answers given.

    ```python
    >>> chooser = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    >>> chooser(image="podium.jpg", question="Why is she smiling?", choices=["She won.", "It rains."])
    [{'score': 0.88, 'answer': 'She won.'}, {'score': 0.12, 'answer': 'It rains.'}]
    ```
    """

    def __call__(self, image: Any, question: str | None = None, choices: Sequence[str] | None = None, **kwargs):
        """
        Args:
            image (`PIL.Image.Image`, `str`, `np.ndarray`, `Mapping[str, Any]`, or a list of them):
                A picture, its path, URL or base64, whose regions the detector of the checkpoint finds; the regions as
                [`InterBERTProcessor`] takes them, a row of a region dataset for instance; or an image id of
                `region_dataset`. Without `question` and `choices`: a dict `{"image": ..., "question":
                ..., "choices": [...]}`, or a list, a generator or a torch dataset of them.
            question (`str`, *optional*):
                Asked of every image. For rationales: "question [SEP] answer", as in training.
            choices (`Sequence[str]`, *optional*):
                What there is to choose from.
            batch_size (`int`, *optional*):
                Other than that of the pipeline.

        Returns:
            `list[dict]` for one image, otherwise one for each, the best choice first: `answer`, and `score`; those of
            all choices sum to 1.
        """
        return super().__call__(_one_by_one(image, question=question, choices=choices), **kwargs)

    def preprocess(self, item: Any) -> Iterator[dict]:
        image, question, choices = _read_input(item, ("image", "question", "choices"))
        question, choices = _check_text("question", question), _check_texts("choices", choices)
        pairs = self._pairs(image, [question] * len(choices), choices)
        for choice, pair in zip(choices, pairs, strict=True):
            yield {"choice": choice, **pair}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        choice = model_inputs.pop("choice")
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            model_inputs[name] = model_inputs[name][:, None]  # (pairs, 1, tokens): each with one of its choices
        outputs, others = self._run_model(model_inputs)
        return {"logits": outputs.logits.float(), "choice": choice, **others}

    def postprocess(self, model_outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        logits = torch.cat([output["logits"][0] for output in model_outputs])  # (choices,)
        scores = logits.softmax(dim=0).tolist()
        order = logits.argsort(descending=True, stable=True).tolist()
        return [{"score": scores[index], "answer": model_outputs[index]["choice"]} for index in order]


class FeatureExtractionPipeline(RegionPipeline):
    """
    Pooled features of pairs of a text and an image, to train a classifier on ([`InterBERTModel`]): task
    `feature-extraction`.

    ```python
    >>> extractor = pipeline("feature-extraction", model=checkpoint, trust_remote_code=True)
    >>> extractor(image="beach.jpg", text="two dogs on a beach")["text"]
    [0.0, 1.35, ...]
    ```
    """

    def __call__(self, image: Any, text: str | None = None, **kwargs):
        """
        Args:
            image (`PIL.Image.Image`, `str`, `np.ndarray`, `Mapping[str, Any]`, or a list of them):
                A picture, its path, URL or base64, whose regions the detector of the checkpoint finds; the regions as
                [`InterBERTProcessor`] takes them, a row of a region dataset for instance; or an image id of
                `region_dataset`. Without `text`: a dict `{"image": ..., "text": ...}`, or a list, a
                generator or a torch dataset of them.
            text (`str`, *optional*):
                Read together with every image.
            batch_size (`int`, *optional*):
                Other than that of the pipeline.

        Returns:
            A dict for one image, otherwise one for each: `text` and `image`, the pooled vectors of the two streams as
            lists of `config.pooler_size` numbers.
        """
        return super().__call__(_one_by_one(image, text=text), **kwargs)

    def preprocess(self, item: Any) -> Iterator[dict]:
        image, text = _read_input(item, ("image", "text"))
        yield from self._pairs(image, [_check_text("text", text)])

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        outputs, others = self._run_model(model_inputs, pooled_only=True)
        return {"text": outputs.text_pooler_output, "image": outputs.vision_pooler_output, **others}

    def postprocess(self, model_outputs: list[dict[str, Any]]) -> dict[str, list[float]]:
        return {name: model_outputs[0][name][0].float().tolist() for name in ("text", "image")}
