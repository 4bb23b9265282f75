"""
Answers the requests to an Inference Endpoint of this repository, with the pipeline of its checkpoint:

    {"inputs": {"image": "https://example.org/kitchen.jpg", "question": "What is on the table?"},
     "parameters": {"top_k": 3}}

`image` is a URL, the base64 of a picture, or what a detector says of it: `{"features": [[…], …], "boxes": [[x1, y1, x2,
y2], …], "width": 640, "height": 480}`. `inputs` may be a list. What else it holds depends on the checkpoint:
`question`, `candidate_labels`, `choices`, or a text alone.
"""

from typing import Any

from PIL import Image
from transformers import AutoConfig, pipeline

# Pillow refuses pictures of twice as many pixels: a small file can be a picture that fills the memory.
Image.MAX_IMAGE_PIXELS = 25_000_000


class EndpointHandler:
    """
    Args:
        path: The repository's files.
    """

    def __init__(self, path: str = ""):
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        self.takes_images = bool(config.custom_pipelines)
        task = next(iter(config.custom_pipelines), "text-classification")
        self.pipeline = pipeline(task, model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data: `inputs`, and `parameters` of the pipeline's call, if any.

        Returns:
            What the pipeline gives, as JSON has it.

        Raises:
            `ValueError`: there are no `inputs`, or not such as the pipeline takes. The server sends its message.
        """
        if "inputs" not in data:
            raise ValueError(f"Expected `inputs`, got {sorted(data)}.")
        inputs = data["inputs"]
        if self.takes_images:
            inputs = [_without_paths(item) for item in inputs] if isinstance(inputs, list) else _without_paths(inputs)
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"Expected `parameters` with names, got {type(parameters).__name__}.")
        if not self.takes_images:
            parameters = {"truncation": True} | parameters  # as the pipelines of images do by themselves
        return self.pipeline(inputs, **parameters)


def _without_paths(item: Any) -> Any:
    """An input whose picture is not looked for among the files of the server: it is a URL, or base64."""
    if isinstance(item, dict):
        return item | {"image": _without_paths(item["image"])} if "image" in item else item
    if not isinstance(item, str) or item.startswith(("http://", "https://")):
        return item
    return f"data:image/;base64,{item.rpartition(',')[2]}"
