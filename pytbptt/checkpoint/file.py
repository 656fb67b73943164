"""Checkpoints: one file, written whole or not at all, read without running anything from it.

A file is what torch.save writes, followed by a seal: SEAL and the SHA-256 of all that comes before it. torch.load does
not mind the seal, and without it would not notice a flipped bit.
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
from pytbptt.data.text_format import NO_RESETS
from pytbptt.errors import InputError, RunError
from pytbptt.nn.architectures import ARCHITECTURES
from pytbptt.nn.language_model import LanguageModel, ModelConfig
from pytbptt.runtime.atomic import replacing
from pytbptt.runtime.cli import as_type

SEAL = b"pytbptt\x00"
LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"
KEPT = re.compile(r"checkpoint_(\d+)\.pt")
"""What a former checkpoint_last.pt is called, by its update."""
FORMAT = 1
TOKENS_PER_SAMPLE = 128
"""How many tokens evaluation reads at once where no run says it."""
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
    """A copy of a checkpoint's contents in the host's memory, which training does not change any more.

    Tensors that are one, such as tied weights, stay one.
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
    """Save under a temporary name, flush to the disk, rename: `path` is the old file or the new one, never a part.

    Raises:
        RunError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    try:
        with replacing(path) as file:
            hashed = _Hashed(file)
            torch.save(dict(checkpoint), typing.cast(IO[bytes], hashed))
            file.write(SEAL + hashed.digest.digest())
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides a failing disk behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        kept = f"; the checkpoint before it is intact: {path}" if path.exists() else ""
        raise RunError(f"could not save {path}: {reason}{kept}") from None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU.

    Raises:
        InputError: missing, truncated or corrupt, carrying code (which is never run), or none of pytbptt's.
    """
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a checkpoint of python -m pytbptt.train")
    if not _is_sealed(path):
        raise InputError(f"{path}: truncated or corrupt, or no checkpoint of pytbptt: its contents and its seal differ")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is in the file decides which
        code = re.search(r"global:? ([\w.]+)", str(error), re.IGNORECASE)
        found = f"found code in the checkpoint ({code[1]})" if code else "found something else"
        raise InputError(f"{path}: {found}, expected tensors and values: refused") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= KEYS:
        found = f"keys {sorted(checkpoint)}" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise InputError(f"{path}: not a checkpoint of pytbptt: found {found}, expected {sorted(KEYS)}")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: found checkpoint format {checkpoint['format']}, expected {FORMAT}")
    return checkpoint


class _Hashed:
    """Writes to a file what it hashes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _is_sealed(path: Path) -> bool:
    digest, length = hashlib.sha256(), len(SEAL) + hashlib.sha256().digest_size
    unread = path.stat().st_size - length
    with open(path, "rb") as file:
        while unread > 0:
            block = file.read(min(unread, 1 << 20))
            if not block:
                return False
            digest.update(block)
            unread -= len(block)
        return file.read() == SEAL + digest.digest()


def kept(save_dir: Path) -> dict[int, Path]:
    """The former last checkpoints in a folder by their updates, newest first."""
    found = {int(match[1]): path for path in save_dir.iterdir() if (match := KEPT.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def read_latest(save_dir: Path, quiet: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a folder; if it is broken the ones kept before it, newest first, and then the best one.

    Args:
        save_dir: the folder.
        quiet: do not warn of what is broken.

    Returns:
        Which it is and its contents; None if there is none.

    Raises:
        InputError: there are checkpoints, and all are broken.
    """
    paths = [path for path in (save_dir / LAST, *kept(save_dir).values(), save_dir / BEST) if path.exists()]
    return read_first(paths, quiet) if paths else None


def read_first(paths: Sequence[Path], quiet: bool) -> tuple[Path, dict[str, Any]]:
    """The first of some checkpoints, at least one, that is not broken; as `read_latest`."""
    for path, following in zip(paths, [*paths[1:], None], strict=False):
        try:
            return path, read(path)
        except InputError as error:
            if following is None:
                raise
            if not quiet:
                print(f"warning: {error}; falling back to {following}", file=sys.stderr)
    raise AssertionError("no paths")


def without_run(model: LanguageModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """A checkpoint of weights that no run of pytbptt made: whatever evaluates reads it, training refuses it.

    Its memory is never forgotten, as other projects carry it through all of a text.
    """
    return {
        **dict.fromkeys(KEYS),
        "format": FORMAT,
        "model": model.state_dict(),
        "config": {"model": model_state(model.config), "run": {"tokens_per_sample": TOKENS_PER_SAMPLE}},
        "vocabulary": vocabulary.state_dict(),
        "text": TextFormat(reset_on=NO_RESETS).state(),
    }


def model_state(config: ModelConfig) -> dict[str, Any]:
    """A model's configuration as a checkpoint holds it."""
    return {"arch": config.arch, **dataclasses.asdict(config)}


def model_config(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The other way; `overrides` replaces fields.

    Raises:
        InputError: a field that the architecture does not have, naming the nearest, or a value of another type.
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
    """How a checkpoint's text became documents, and where memory was forgotten; of an older one, what it says of it."""
    older = {"reset_on": checkpoint["config"]["run"].get("reset_on", "auto")}
    return TextFormat.from_state(checkpoint.get("text", older))


class LoadedCheckpoint(NamedTuple):
    """A trained model, and what goes with it."""

    model: LanguageModel
    """In evaluation mode, with its averaged weights where it has them."""
    vocabulary: Vocabulary
    run: dict[str, Any]
    """The run's settings by flag name; of a converted model, how many tokens to read at once."""
    text_format: TextFormat
    """How its text became documents, and where memory was forgotten."""


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
