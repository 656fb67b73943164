"""Checkpoint files: written atomically, verified by a checksum, and loaded without running code from them.

A file is torch.save's output followed by FOOTER_MAGIC and a SHA-256 of everything before it. torch.load ignores the
trailer; without it a flipped bit would go unnoticed.
"""

import dataclasses
import difflib
import hashlib
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from pytbptt.data import TextFormat, Vocabulary
from pytbptt.data.text_format import RESET_NEVER
from pytbptt.errors import InputError, RunError
from pytbptt.nn.architectures import ARCHITECTURES
from pytbptt.nn.language_model import LanguageModel, ModelConfig
from pytbptt.runtime.atomic import atomic_write
from pytbptt.runtime.cli import as_type

FOOTER_MAGIC = b"pytbptt\x00"
LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"
KEPT = re.compile(r"checkpoint_(\d+)\.pt")
"""The name that --keep-last gives an earlier checkpoint_last.pt, by its update."""
FORMAT = 1
TOKENS_PER_SAMPLE = 128
"""Chunk length for evaluating converted checkpoints, which record none."""
KEYS = {
    "format",
    "model",
    "average",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "loader",
    "validation",
    "memory",
    "config",
    "vocabulary",
    "progress",
}


def snapshot(value: Any) -> Any:
    """A copy of a checkpoint's contents in host memory, which further training does not change.

    Tensors that share memory, such as tied weights, still share it in the copy.
    """
    copies: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, Mapping):
            return {key: copy(element) for key, element in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(element) for element in value)
        return value

    return copy(value)


def write(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Save atomically: whatever happens, `path` is the old file or the whole new one.

    Raises:
        RunError: the disk is full or the folder cannot be written; the file that was there before is intact.
    """
    try:
        with atomic_write(path) as file:
            hashing = _HashingWriter(file)
            torch.save(dict(checkpoint), typing.cast(IO[bytes], hashing))
            file.write(FOOTER_MAGIC + hashing.digest.digest())
    except (OSError, RuntimeError) as error:
        # torch's zip writer raises a RuntimeError of its own, with the OSError as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        previous = f"; the previous checkpoint is intact: {path}" if path.exists() else ""
        raise RunError(f"could not save {path}: {reason}{previous}") from None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU.

    Raises:
        InputError: the file is missing, truncated or corrupt, contains code (which is never run), or is not a
            checkpoint of pytbptt.
    """
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a checkpoint of python -m pytbptt.train")
    if not _verify_checksum(path):
        raise InputError(
            f"{path}: found no valid checksum, expected one: truncated, corrupt, or not pytbptt's checkpoint"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost any type, depending on the file
        code = re.search(r"global:? ([\w.]+)", str(error), re.IGNORECASE)
        found = f"found code in the checkpoint ({code[1]})" if code else "found something else"
        raise InputError(f"{path}: {found}, expected tensors and values: refused") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= KEYS:
        found = f"keys {sorted(checkpoint)}" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise InputError(f"{path}: not a checkpoint of pytbptt: found {found}, expected {sorted(KEYS)}")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: found checkpoint format {checkpoint['format']}, expected {FORMAT}")
    return checkpoint


class _HashingWriter:
    """Passes what is written on to a file, and hashes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _verify_checksum(path: Path) -> bool:
    """Whether the file ends with FOOTER_MAGIC and the SHA-256 of everything before it."""
    digest, length = hashlib.sha256(), len(FOOTER_MAGIC) + hashlib.sha256().digest_size
    unread = path.stat().st_size - length
    with open(path, "rb") as file:
        while unread > 0:
            block = file.read(min(unread, 1 << 20))
            if not block:
                return False
            digest.update(block)
            unread -= len(block)
        return file.read() == FOOTER_MAGIC + digest.digest()


def kept_checkpoints(save_dir: Path) -> dict[int, Path]:
    """The earlier checkpoints that --keep-last kept in a folder, by their updates, newest first."""
    found = {int(match[1]): path for path in save_dir.iterdir() if (match := KEPT.fullmatch(path.name))}
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
    paths = [path for path in (save_dir / LAST, *kept_checkpoints(save_dir).values(), save_dir / BEST) if path.exists()]
    return read_first(paths, quiet) if paths else None


def read_first(paths: Sequence[Path], quiet: bool) -> tuple[Path, dict[str, Any]]:
    """The first undamaged one of at least one checkpoint; see `read_latest`."""
    for path, following in zip(paths, [*paths[1:], None], strict=False):
        try:
            return path, read(path)
        except InputError as error:
            if following is None:
                raise
            if not quiet:
                print(f"warning: {error}; falling back to {following}", file=sys.stderr)
    raise AssertionError("no paths")


def weights_only_checkpoint(model: LanguageModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """A checkpoint of converted weights: it can be evaluated and fine-tuned, but there is no run to resume.

    Its text format never resets memory: other projects carry memory through the whole text.
    """
    return {
        **dict.fromkeys(KEYS),
        "format": FORMAT,
        "model": model.state_dict(),
        "config": {"model": model_state(model.config), "run": {"tokens_per_sample": TOKENS_PER_SAMPLE}},
        "vocabulary": vocabulary.state_dict(),
        "text": TextFormat(reset_on=RESET_NEVER).state(),
    }


def model_state(config: ModelConfig) -> dict[str, Any]:
    """A model's configuration as a checkpoint stores it."""
    return {"arch": config.arch, **dataclasses.asdict(config)}


def model_config(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The inverse of `model_state`; `overrides` replaces fields.

    Raises:
        InputError: a field that the architecture does not have (names the nearest), or a value of another type.
    """
    values = dict(state)
    kind = ARCHITECTURES[values.pop("arch")]
    known = [entry.name for entry in dataclasses.fields(kind)]
    for key, value in (overrides or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(f"--model-overrides: {key}: unknown{f'; did you mean {near[0]}?' if near else ''}")
        values[key] = as_type(typing.get_type_hints(kind)[key], value, f"--model-overrides: {key}")
    return kind(**values)


def text_format(checkpoint: Mapping[str, Any]) -> TextFormat:
    """The text format of a checkpoint; from older checkpoints without one, as much as --reset-on says of it."""
    older = {"reset_on": checkpoint["config"]["run"].get("reset_on", "auto")}
    return TextFormat.from_state(checkpoint.get("text", older))


class LoadedCheckpoint(NamedTuple):
    """A trained model, its vocabulary and its settings."""

    model: LanguageModel
    """In evaluation mode, with the averaged weights if there are any."""
    vocabulary: Vocabulary
    run: dict[str, Any]
    """The run's settings by flag name; for a converted model, only tokens_per_sample."""
    text_format: TextFormat
    """How its text was split into documents, and where memory was reset."""


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", overrides: Mapping[str, Any] | None = None
) -> LoadedCheckpoint:
    """The model of a checkpoint, for evaluation and generation.

    Args:
        path: a file that training or conversion wrote.
        device: where the model goes.
        overrides: fields of the model's configuration to replace, such as mem_len.

    Raises:
        InputError: an unreadable checkpoint, or overrides that do not fit it.
    """
    path = Path(path)
    checkpoint = read(path)
    model = model_config(checkpoint["config"]["model"], overrides).build()
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: weights do not fit the model (--model-overrides?): {detail}") from None
    average, run = checkpoint["average"], checkpoint["config"]["run"]
    if average is not None and average["mean"] is not None and average["updates"]:
        model.load_state_dict(average["mean"], strict=False)
    return LoadedCheckpoint(
        model.to(device).eval(),
        Vocabulary.from_state_dict(checkpoint["vocabulary"]),
        run,
        text_format(checkpoint),
    )
