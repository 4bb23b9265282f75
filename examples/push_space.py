#!/usr/bin/env python
"""
Makes a Space on the Hub of the demo in examples/app.py, with a checkpoint and a region dataset of the Hub:

    python examples/push_space.py org/interbert-demo --model org/interbert-base-flickr30k \\
        --vqa_model org/interbert-base-vqa2 --dataset org/my-regions --split validation[:500]

The Space is a copy of the code that the demo needs, with these arguments in `space_settings.yaml`; the same command
with others writes it anew. Private checkpoints and datasets need the secret HF_TOKEN in its settings.
"""

import argparse
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi, SpaceCard

EXAMPLES = Path(__file__).resolve().parent
# app.py, and what it imports.
SCRIPTS = ("app.py", "arguments.py", "image_index.py", "pictures.py", "region_drawing.py", "visualize_attention.py")
PACKAGES = ("configuration_interbert", "modeling_interbert", "processing")


def write_space(folder: Path, model: str, vqa_model: str | None, dataset: str, split: str):
    """Writes the files of the Space. The arguments are those of the script."""
    sources = [EXAMPLES / name for name in SCRIPTS] + [EXAMPLES / "space" / "requirements.txt"]
    targets = {path.name: path for path in sources}
    for package in PACKAGES:
        root = EXAMPLES.parent
        targets |= {str(path.relative_to(root)): path for path in sorted((root / package).rglob("*.py"))}
    for name, source in targets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    card = SpaceCard.load(EXAMPLES / "space" / "README.md")
    card.data.models, card.data.datasets = [name for name in (model, vqa_model) if name is not None], [dataset]
    card.save(folder / "README.md")
    settings = {"model_name_or_path": model, "dataset_name": dataset, "split": split}
    if vqa_model is not None:
        settings["vqa_model_name_or_path"] = vqa_model
    (folder / "space_settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description="Make a Space of the demo.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("repo_id", help="Space to create, or to write anew.")
    parser.add_argument("--model", required=True, help="Checkpoint on the Hub, pretrained or for image retrieval.")
    parser.add_argument("--vqa_model", help="Checkpoint on the Hub that answers questions.")
    parser.add_argument("--dataset", required=True, help="Region dataset on the Hub, with a column of pictures.")
    parser.add_argument("--split", default="validation", help="Split that is shown.")
    parser.add_argument("--private", action="store_true", help="Creates a private Space.")
    parser.add_argument("--hub_token", help="Token for the upload, if not logged in.")
    args = parser.parse_args()

    api = HfApi(token=args.hub_token)
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), args.model, args.vqa_model, args.dataset, args.split)
        url = api.create_repo(
            args.repo_id, repo_type="space", space_sdk="gradio", exist_ok=True, private=args.private or None
        )
        api.upload_folder(
            repo_id=url.repo_id, repo_type="space", folder_path=folder, commit_message="The demo of InterBERT"
        )
    print(f"Space: {url}")


if __name__ == "__main__":
    main()
