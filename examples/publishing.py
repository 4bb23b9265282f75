"""What becomes of a trained model: its card, and its way to the Hub."""

import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

import processing
from configuration_interbert.configuration_interbert import PIPELINES
from draw_architecture import save_architecture
from model_cards import CHECKPOINTS, TrainedCard, WidgetExample
from model_cards.model_card import ARCHITECTURE_PICTURE
from model_loading import ModelArguments
from pictures import UNREADABLE, Pictures
from processing import RegionDataset
from processing.region_extractors import detector_settings
from processing.tasks import canonical_image_id
from result_files import PREDICTION_FILES

if TYPE_CHECKING:
    from training import OutputArguments, TrainingRun

CHECKPOINT_BRANCH = "checkpoints"
# What an Inference Endpoint of the repository runs.
ENDPOINT_FILES = sorted((Path(__file__).resolve().parent / "endpoint").glob("*.*"))
NUM_WIDGET_EXAMPLES = 3
# What of a checkpoint is a model, and not for the training itself alone.
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*.py", "eval_results.json"]


def create_repository(output_args: "OutputArguments", config: PreTrainedConfig) -> str:
    """
    Creates the repository to upload to, before the training, so that a wrong name or token shows at once.

    Raises:
        ValueError: the model's configuration names a region detector that others cannot open.
    """
    detector = getattr(config, "region_detector", None)
    if detector is not None and Path(detector_settings(detector)["name_or_path"]).is_dir():
        raise ValueError(
            "`--push_to_hub`: expected a `--region_detector` that is on the Hub, or none, got the folder "
            f"{detector_settings(detector)['name_or_path']}."
        )
    api = HfApi(token=output_args.hub_token)
    repo_id = output_args.hub_model_id or Path(output_args.output_dir).absolute().name
    repo_id = api.create_repo(repo_id, private=output_args.hub_private_repo or None, exist_ok=True).repo_id
    if output_args.push_checkpoints:
        api.create_branch(repo_id, branch=CHECKPOINT_BRANCH, exist_ok=True)
    return repo_id


def upload_checkpoint(folder: Path, repo_id: str, step: int, token: str | None) -> Future:
    """Begins to upload the model of a checkpoint to the branch of checkpoints."""
    return HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=CHECKPOINT_BRANCH,
        commit_message=f"Step {step}",
        allow_patterns=MODEL_FILES,
        run_as_future=True,
    )


@dataclass
class WidgetInputs:
    """
    What the examples on a checkpoint's page are chosen from.

    Args:
        regions: Of images whose pictures may be at hand.
        inputs: Of the checkpoint's pipeline, with the image by its id.
    """

    regions: RegionDataset
    inputs: Iterable[dict[str, Any]]


def match_inputs(pairs: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """
    Each image with its own caption and those of the two images before.

    Args:
        pairs: Image ids and captions. Of each image the first caption without a comma is taken: on the page, commas
            separate the texts.
    """
    captions: dict[str, str] = {}
    for image_id, caption in pairs:
        if image_id in captions or "," in caption:
            continue
        if len(captions) >= 2:
            yield {"image": image_id, "candidate_labels": [caption, *list(captions.values())[-2:]]}
        captions[image_id] = caption


def run_widget(
    model: PreTrainedModel, processor: ProcessorMixin, widget: WidgetInputs, folder: Path
) -> list[WidgetExample]:
    """Examples with what the pipeline of the model gives for them. Their pictures are written to the folder."""
    _, pipeline_class, _ = PIPELINES[type(model).__name__]
    run = getattr(processing, pipeline_class)(model.eval(), processor=processor, device=model.device)
    examples = []
    for number, (picture, inputs) in enumerate(islice(_pictured(widget), NUM_WIDGET_EXAMPLES)):
        src = f"widget-{number}.png"
        picture.save(folder / src)
        results = [{name: _rounded(value) for name, value in result.items()} for result in run(inputs)]
        if "question" in inputs:
            examples.append(WidgetExample(src, output=results[0], text=inputs["question"]))
        else:
            examples.append(WidgetExample(src, output=results, candidate_labels=", ".join(inputs["candidate_labels"])))
    return examples


def _pictured(widget: WidgetInputs) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """The inputs whose images have a picture and regions, with the regions in the place of the id."""
    pictures = Pictures(widget.regions)
    if not pictures.are_at_hand:
        return
    # Questions name images in this form.
    rows = {canonical_image_id(image_id): row for row, image_id in enumerate(widget.regions.image_ids)}
    for inputs in widget.inputs:
        row = rows[canonical_image_id(inputs["image"])]
        record = widget.regions[row]
        try:
            picture = pictures.open(row)
        except UNREADABLE:
            continue
        if picture is not None and len(record["boxes"]):
            yield picture, inputs | {"image": record}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def upload_model(run: "TrainingRun"):
    """
    Uploads the output folder, without the checkpoints on the way and the predictions, in one commit, if that was asked
    for.
    """
    output_args = run.output_args
    if output_args.push_to_hub:
        commit = HfApi(token=output_args.hub_token).upload_folder(
            repo_id=run.repo_id,
            folder_path=output_args.output_dir,
            commit_message="End of training",
            # run.json names files of this machine, predictions have texts of a dataset that may be private.
            ignore_patterns=["checkpoint-*", "*.unfinished*", "run.json", *PREDICTION_FILES],
        )
        print(f"Uploaded: {commit.commit_url}")


def publish(
    run: "TrainingRun",
    auto_class: str,
    dataset_name: str,
    model_args: ModelArguments,
    arguments: dict[str, Any],
    widget: WidgetInputs | None = None,
) -> PreTrainedModel:
    """
    Writes the trained model with its card and what an Inference Endpoint needs, and uploads it if that was asked for.
    All processes call this.

    Args:
        auto_class: Name of the auto class that the model is for.
        dataset_name: What it was trained on.
        arguments: What the card says of the training.
        widget: Examples for the page on the Hub, which `--widget_pictures` asks for.

    Returns:
        The trained model, its weights averaged if they were.
    """
    run.write_final_model()
    model = run.trained_model()
    output_args = run.output_args
    if not run.accelerator.is_main_process:
        return model
    if not output_args.widget_pictures:
        widget = None
    is_interbert = model.config.model_type == "interbert"
    if is_interbert:
        save_architecture(model.config, run.output_dir / ARCHITECTURE_PICTURE)
        for path in ENDPOINT_FILES:
            shutil.copy(path, run.output_dir)
    TrainedCard(
        repo_id=run.repo_id or output_args.output_dir,
        auto_class=auto_class,
        pipeline_tag=PIPELINES.get(type(model).__name__, ("text-classification",))[0],
        config=model.config,
        num_parameters=model.num_parameters(),
        dataset_name=dataset_name,
        training_arguments=arguments,
        results=run.results,
        initialized_from=model_args.model_name_or_path or model_args.bert_name_or_path,
        checkpoint=None if output_args.model_card is None else CHECKPOINTS[output_args.model_card],
        widget=[] if widget is None else run_widget(model, run.processor, widget, run.output_dir),
    ).render().save(run.output_dir / "README.md")
    code = ", trust_remote_code=True" if is_interbert else ""
    print(
        f"\nThe model is in {output_args.output_dir}:\n\n    "
        f'{auto_class}.from_pretrained("{output_args.output_dir}"{code})\n'
    )
    upload_model(run)
    return model
