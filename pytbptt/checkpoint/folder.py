"""The checkpoints in a run's folder, and which of them to resume from."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytbptt.checkpoint.file import read
from pytbptt.errors import InputError

LAST_CHECKPOINT, BEST_CHECKPOINT = "checkpoint_last.pt", "checkpoint_best.pt"
KEPT_CHECKPOINT_PATTERN = re.compile(r"checkpoint_(\d+)\.pt")
"""The name that --keep-last gives an earlier checkpoint_last.pt, by its update."""


def kept_checkpoints(save_dir: Path) -> dict[int, Path]:
    """The earlier checkpoints that --keep-last kept in a folder, by their updates, newest first."""
    found = {
        int(match[1]): path for path in save_dir.iterdir() if (match := KEPT_CHECKPOINT_PATTERN.fullmatch(path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def read_latest(save_dir: Path, quiet: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a folder; if it is damaged, the newest undamaged kept one, and after those the best one.

    Args:
        save_dir: the folder.
        quiet: do not warn of damaged files.

    Returns:
        Its path and contents; None if the folder has no checkpoint.

    Raises:
        InputError: there are checkpoints, but all are damaged.
    """
    paths = [
        path
        for path in (save_dir / LAST_CHECKPOINT, *kept_checkpoints(save_dir).values(), save_dir / BEST_CHECKPOINT)
        if path.exists()
    ]
    return read_first_undamaged(paths, quiet) if paths else None


def read_first_undamaged(paths: Sequence[Path], quiet: bool) -> tuple[Path, dict[str, Any]]:
    """The first undamaged of these checkpoints, at least one; see `read_latest`."""
    for path, next_path in zip(paths, [*paths[1:], None], strict=False):
        try:
            return path, read(path)
        except InputError as error:
            if next_path is None:
                raise
            if not quiet:
                print(f"warning: {error}; falling back to {next_path}", file=sys.stderr)
    raise AssertionError("no paths")
