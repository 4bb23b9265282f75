"""What becomes of a trained model: its card, and its way to the Hub."""

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from model_cards import TrainedCard
from model_loading import ModelArguments

if TYPE_CHECKING:
    from training import OutputArguments, TrainingRun

CHECKPOINT_BRANCH = "checkpoints"
# What of a checkpoint is a model, and not for the training itself alone.
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*.py", "eval_results.json"]


def create_repository(output_args: "OutputArguments") -> str:
    """Creates the repository to upload to, before the training, so that a wrong name or token shows at once."""
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


def publish(
    run: "TrainingRun", auto_class: str, dataset_name: str, model_args: ModelArguments, arguments: dict[str, Any]
):
    """
    Writes the trained model with its card, and uploads the output folder, without the checkpoints on the way, in one
    commit if that was asked for. All processes call this.

    Args:
        auto_class: Name of the auto class that the model is for.
        dataset_name: What it was trained on.
        arguments: What the card says of the training.
    """
    run.write_final_model()
    output_args = run.output_args
    if not run.accelerator.is_main_process:
        return
    model = run.accelerator.unwrap_model(run.model)
    TrainedCard(
        repo_id=run.repo_id or output_args.output_dir,
        auto_class=auto_class,
        config=model.config,
        num_parameters=model.num_parameters(),
        dataset_name=dataset_name,
        training_arguments=arguments,
        results=run.results,
        initialized_from=model_args.model_name_or_path or model_args.bert_name_or_path,
    ).render().save(run.output_dir / "README.md")
    code = ", trust_remote_code=True" if hasattr(model.config, "auto_map") else ""
    print(
        f"\nThe model is in {output_args.output_dir}:\n\n    "
        f'{auto_class}.from_pretrained("{output_args.output_dir}"{code})\n'
    )
    if output_args.push_to_hub:
        commit = HfApi(token=output_args.hub_token).upload_folder(
            repo_id=run.repo_id,
            folder_path=output_args.output_dir,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "*.unfinished*"],
        )
        print(f"Uploaded: {commit.commit_url}")
