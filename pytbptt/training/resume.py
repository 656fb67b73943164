"""Resuming a run from a checkpoint: which settings must be equal, and which may change."""

from typing import Any

from pytbptt import checkpoint as checkpoints
from pytbptt.errors import InputError
from pytbptt.training.config import flatten
from pytbptt.training.trainer import Trainer

# A run cannot change these halfway: its position in the data and the optimizer's state would mean something else.
STREAM_FIELDS = ("tokens_per_sample", "bptt_variation", "rotate", "reset_on", "seed")
# These may change between two updates.
REGULARISATION_FIELDS = ("dropout", "dropatt", "dropouth", "dropouti", "dropoute", "weight_drop", "alpha", "beta")
OPTIMIZER_FIELDS = ("optimizer", "weight_decay", "adam_betas", "adam_eps", "momentum")


def resume(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Resume from a checkpoint's contents: every stream at its position, however ranks and groups share the streams.

    Raises:
        InputError: the checkpoint has a different model, vocabulary or optimizer, or different streams and
            --reset-streams is not given.
    """
    _check_compatible(trainer, checkpoint)
    mismatch = _stream_mismatch(trainer, checkpoint)
    if mismatch and not trainer.settings.checkpoint.reset_streams:
        raise InputError(
            f"{trainer.save_dir}: holds a run {mismatch}: --reset-streams resumes with its weights and starts the "
            "streams from their beginning, --restart starts from scratch; or choose another --save-dir"
        )
    trainer.load_state_dict(checkpoint, streams=not mismatch)


def changed_regularisation(trainer: Trainer, checkpoint: dict[str, Any]) -> str:
    """Which regularisation settings differ from the checkpoint's, for the log; empty if none."""
    found, now = checkpoint["config"]["model"], checkpoints.model_config_to_dict(trainer.model.config)
    changed = [key for key in REGULARISATION_FIELDS if key in now and found.get(key) != now[key]]
    return ", ".join(f"--{key.replace('_', '-')} {now[key]} from now on, {found.get(key)} so far" for key in changed)


def load_finetune_weights(trainer: Trainer, path: str) -> None:
    """Load a checkpoint's weights, averaged ones if it has them, into the model of a new run.

    Raises:
        InputError: the checkpoint has a different architecture or vocabulary.
    """
    flag = f"--finetune-from-model {path}"
    loaded = checkpoints.load_checkpoint(path)
    found, expected = (
        checkpoints.model_config_to_dict(config) for config in (loaded.model.config, trainer.model.config)
    )
    differing = [key for key in found if key not in REGULARISATION_FIELDS and found[key] != expected.get(key)]
    if differing:
        wanted = " ".join(f"--{key.replace('_', '-')} {found[key]}" for key in differing)
        raise InputError(f"{flag}: found a model of other settings, expected these flags: {wanted}")
    if loaded.vocabulary.fingerprint() != trainer.train_tokens.vocabulary.fingerprint():
        raise InputError(f"{flag}: found another vocabulary than the data's, expected data prepared with its dict.txt")
    trainer.model.load_state_dict(loaded.model.state_dict())


def _check_compatible(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    advice = "start from scratch with --restart, or choose another --save-dir"
    found = checkpoint["config"]["model"]
    for key, expected in checkpoints.model_config_to_dict(trainer.model.config).items():
        if found.get(key) != expected and key not in REGULARISATION_FIELDS:
            raise InputError(
                f"{trainer.save_dir}: holds a run with {key} {found.get(key)}, the settings say {expected}: {advice}"
            )
    run, settings = checkpoint["config"]["run"], flatten(trainer.settings)
    for key in OPTIMIZER_FIELDS:
        if run[key] != settings[key]:
            flag = "--" + key.replace("_", "-")
            raise InputError(
                f"{trainer.save_dir}: holds a run with {flag} {run[key]}, the settings say {settings[key]}: {advice}"
            )
    if checkpoint["vocabulary"] != trainer.train_tokens.vocabulary.state_dict():
        raise InputError(f"{trainer.save_dir}: holds a run with another vocabulary than the data's: {advice}")


def _stream_mismatch(trainer: Trainer, checkpoint: dict[str, Any]) -> str:
    """How the checkpoint's streams differ, as the end of a message; empty if they do not."""
    run, settings, loader = checkpoint["config"]["run"], flatten(trainer.settings), checkpoint["loader"]
    for key in STREAM_FIELDS:
        if run[key] != settings[key]:
            return f"with --{key.replace('_', '-')} {run[key]}, the settings say {settings[key]}"
    if loader["data"] != trainer.train_tokens.fingerprint():
        return f"on other data than {trainer.settings.data.data}"
    if loader["streams"] != trainer.loader.streams:
        return (
            f"of {loader['streams']} streams, but --batch-size x --update-freq x processes is {trainer.loader.streams}"
        )
    return ""
