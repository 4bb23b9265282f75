"""
Answers the requests to an Inference Endpoint of this repository, with the pipeline of its checkpoint:

    {"inputs": {"image": "https://example.org/kitchen.jpg", "question": "What is on the table?"},
     "parameters": {"top_k": 3}}

`image` is a URL, the base64 of a picture, or what a detector says of it: `{"features": [[…], …], "boxes": [[x1, y1, x2,
y2], …], "width": 640, "height": 480}`. `inputs` may be a list. What else it holds depends on the checkpoint:
`question`, `candidate_labels`, `choices`, or a text alone.
"""

import os
from typing import Any

from transformers import AutoConfig, pipeline


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
        if self.takes_images:
            for item in data["inputs"] if isinstance(data["inputs"], list) else [data["inputs"]]:
                image = item.get("image") if isinstance(item, dict) else item
                # The pipeline reads files, too; those of the server are nobody's business.
                if isinstance(image, str) and os.path.exists(image):
                    raise ValueError(f"`image`: expected a URL, base64 or regions, got {image!r:.80}.")
        return self.pipeline(data["inputs"], **data.get("parameters") or {})
