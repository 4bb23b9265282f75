"""Checkpoints of a run that is going on: complete or absent, found again, checked, and kept to a number."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from files import file_digest, write_json, write_through

logger = get_logger(__name__)
MANIFEST = "manifest.json"


class CheckpointFolder:
    """
    The folders `checkpoint-STEP` of a run.

    Args:
        path: Folder that they are in.
        total_limit: After one is written, so many of the newest are kept. None keeps all.
    """

    def __init__(self, path: Path, total_limit: int | None = None):
        self.path = path
        self.total_limit = total_limit

    def folder(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def has(self, checkpoint: Path) -> bool:
        """Whether a folder is one of these, however its path is written."""
        return checkpoint.resolve().parent == self.path.resolve()

    def checkpoints(self) -> list[Path]:
        """All, the newest first."""
        complete = [path for path in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(complete, key=_step, reverse=True)

    def save(
        self, accelerator: Accelerator, step: int, write: Callable[[Path], None], keep: Path | None = None
    ) -> Path:
        """
        Writes a checkpoint under a temporary name first, so that a folder of the right name is always complete. All
        processes call this.

        Args:
            write: Called in every process with the folder to write to.
            keep: An older checkpoint that is not to be removed yet.
        """
        folder = self.folder(step)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(unfinished)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            for path in files:
                write_through(path)  # before older checkpoints are removed
            manifest = {path.relative_to(unfinished).as_posix(): file_digest(path) for path in files}
            write_json(unfinished / MANIFEST, manifest)
            replaced = folder.with_name(f"{folder.name}.replaced")
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self.remove_old(keep=(folder, keep))
        accelerator.wait_for_everyone()
        return folder

    def remove_old(self, keep: tuple[Path | None, ...] = ()):
        """Removes all but the newest `total_limit` checkpoints, and those that are to be kept."""
        if self.total_limit is not None:
            for old in self.checkpoints()[self.total_limit :]:
                if old not in keep:
                    shutil.rmtree(old)

    def remove_after(self, step: int):
        """Removes the checkpoints of later steps: those of a run that is not gone on with."""
        for path in self.path.glob("checkpoint-*"):
            match = re.match(r"checkpoint-(\d+)", path.name)
            if match and int(match[1]) > step:
                shutil.rmtree(path)

    def newest_valid(self) -> Path | None:
        """The newest checkpoint without damage; those before it are named in a warning."""
        # Those that were complete but for their name are as good; of one step, the newer ones come first.
        nameless = [
            path.parent
            for suffix in ("unfinished", "replaced")
            for path in self.path.glob(f"checkpoint-*.{suffix}/{MANIFEST}")
        ]
        for folder in sorted([*self.checkpoints(), *nameless], key=_step, reverse=True):
            damage = find_damage(folder)
            if damage is None:
                return folder
            logger.warning(f"{folder} is skipped: {damage}.")
        return None


def _step(folder: Path) -> int:
    return int(re.match(r"checkpoint-(\d+)", folder.name)[1])


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: files that are missing, or not what was written. None if it is sound."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"expected a checkpoint with a {MANIFEST}, {error}"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_digest(folder / name) != digest:
            return f"{name} is not what was written"
    return None
