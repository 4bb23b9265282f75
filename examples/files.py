"""Files that are complete or absent, and known by their contents."""

import hashlib
import json
import os
from pathlib import Path


def write_json(path: Path, value):
    """Writes under another name first, so that a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2), encoding="utf-8")
    unfinished.replace(path)


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
