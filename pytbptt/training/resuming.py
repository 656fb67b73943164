"""Whether a run can go on from a checkpoint, and what of its settings may be others then."""

from typing import Any

from pytbptt import checkpoint as checkpoints
from pytbptt.errors import InputError
from pytbptt.training.config import flatten
from pytbptt.training.trainer import Trainer

# What a run cannot change halfway: its place in the data and the optimizer's state mean nothing under other values.
OF_THE_STREAMS = ("tokens_per_sample", "bptt_variation", "rotate", "reset_on", "seed")
# What a model can have otherwise from one update to the next.
OF_REGULARISATION = ("dropout", "dropatt", "dropouth", "dropouti", "dropoute", "weight_drop", "alpha", "beta")
OF_THE_OPTIMIZER = ("optimizer", "weight_decay", "adam_betas", "adam_eps", "momentum")


def resume(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Go on from a checkpoint's contents: every stream where it stood, however processes and groups share them.

    Raises:
        InputError: a checkpoint of another model, vocabulary or optimizer; of other streams without
            --reset-streams.
    """
    _check_belongs(trainer, checkpoint)
    other_streams = _other_streams(trainer, checkpoint)
    if other_streams and not trainer.settings.checkpoint.reset_streams:
        raise InputError(
            f"{trainer.save_dir}: holds a run {other_streams}: --reset-streams goes on with its weights and begins "
            "the streams afresh, --restart begins anew; or choose another --save-dir"
        )
    trainer.load_state_dict(checkpoint, streams=not other_streams)


def changed_regularisation(trainer: Trainer, checkpoint: dict[str, Any]) -> str:
    """Which settings of dropout and the like are others than the checkpoint's, for the log; empty if none."""
    found, now = checkpoint["config"]["model"], checkpoints.model_state(trainer.model.config)
    changed = [key for key in OF_REGULARISATION if key in now and found.get(key) != now[key]]
    return ", ".join(f"--{key.replace('_', '-')} {now[key]} from here on, {found.get(key)} so far" for key in changed)


def begin_with_weights(trainer: Trainer, path: str) -> None:
    """Give a new run the weights of a checkpoint, its averaged ones where it has them.

    Raises:
        InputError: of another architecture or vocabulary.
    """
    flag = f"--finetune-from-model {path}"
    loaded = checkpoints.load_checkpoint(path)
    found, expected = (checkpoints.model_state(config) for config in (loaded.model.config, trainer.model.config))
    differing = [key for key in found if key not in OF_REGULARISATION and found[key] != expected.get(key)]
    if differing:
        wanted = " ".join(f"--{key.replace('_', '-')} {found[key]}" for key in differing)
        raise InputError(f"{flag}: found a model of other settings, expected its own: {wanted}")
    if loaded.vocabulary.fingerprint() != trainer.train_tokens.vocabulary.fingerprint():
        raise InputError(f"{flag}: found another vocabulary than the data's, expected data prepared with its dict.txt")
    trainer.model.load_state_dict(loaded.model.state_dict())


def _check_belongs(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    advice = "begin anew with --restart, or choose another --save-dir"
    found = checkpoint["config"]["model"]
    for key, expected in checkpoints.model_state(trainer.model.config).items():
        if found.get(key) != expected and key not in OF_REGULARISATION:
            raise InputError(
                f"{trainer.save_dir}: holds a run with {key} {found.get(key)}, the settings say {expected}: {advice}"
            )
    run, settings = checkpoint["config"]["run"], flatten(trainer.settings)
    for key in OF_THE_OPTIMIZER:
        if run[key] != settings[key]:
            flag = "--" + key.replace("_", "-")
            raise InputError(
                f"{trainer.save_dir}: holds a run with {flag} {run[key]}, the settings say {settings[key]}: {advice}"
            )
    if checkpoint["vocabulary"] != trainer.train_tokens.vocabulary.state_dict():
        raise InputError(f"{trainer.save_dir}: holds a run with another vocabulary than the data's: {advice}")


def _other_streams(trainer: Trainer, checkpoint: dict[str, Any]) -> str:
    """What is different about the checkpoint's streams; empty if nothing is."""
    run, settings, loader = checkpoint["config"]["run"], flatten(trainer.settings), checkpoint["loader"]
    for key in OF_THE_STREAMS:
        if run[key] != settings[key]:
            return f"with --{key.replace('_', '-')} {run[key]}, the settings say {settings[key]}"
    if loader["data"] != trainer.train_tokens.fingerprint():
        return f"on other data than {trainer.settings.data.data}"
    if loader["streams"] != trainer.loader.streams:
        return (
            f"of {loader['streams']} streams, --batch-size x --update-freq x processes makes {trainer.loader.streams}"
        )
    return ""
