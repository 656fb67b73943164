"""What a checkpoint holds of a run, and how a run goes on from it."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pytbptt.memory
from pytbptt import checkpoint as checkpoints
from pytbptt.errors import InputError
from pytbptt.training.config import flatten
from pytbptt.training.metrics import Progress

if TYPE_CHECKING:
    from pytbptt.training.trainer import Trainer

# What a run cannot change halfway: its place in the data and the optimizer's state mean nothing under other values.
OF_THE_STREAMS = ("tokens_per_sample", "bptt_variation", "rotate", "reset_on", "seed")
# What a model can have otherwise from one update to the next.
OF_REGULARISATION = ("dropout", "dropatt", "dropouth", "dropouti", "dropoute", "weight_drop", "alpha", "beta")
OF_THE_OPTIMIZER = ("optimizer", "weight_decay", "adam_betas", "adam_eps", "momentum")


def state(trainer: "Trainer") -> dict[str, Any] | None:
    """Everything that a run needs to go on as if it had not been interrupted; None but on the first process."""
    memory = trainer.processes.gather(pytbptt.memory.to(pytbptt.memory.concatenate(trainer.bptt.states), "cpu"))
    rng = trainer.processes.gather(_rng_state(trainer.device))
    rooms = trainer.processes.gather(trainer.capacity.rooms if trainer.capacity is not None else None)
    nll, count, grad_norm, updates = trainer.sums()
    if memory is None:
        return None
    kept = trainer.bptt.kept[0]
    interval = {"nll": nll, "count": count, "grad_norm": grad_norm, "updates": int(updates)}
    return {
        "format": checkpoints.FORMAT,
        "model": trainer.model.state_dict(),
        "average": trainer.average.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        # The learning rate is a function of progress.update: nothing else is the scheduler's.
        "scheduler": {"lr": trainer.learning_rate},
        "scaler": trainer.bptt.scaler.state_dict(),
        "rng": rng,
        "loader": {**trainer.loader.state_dict(), "data": trainer.train_tokens.fingerprint()},
        "validation": trainer.valid_tokens.fingerprint() if trainer.valid_tokens else "",
        "memory": pytbptt.memory.state_dict(pytbptt.memory.concatenate(memory)),
        "config": {"model": checkpoints.model_state(trainer.model_config), "run": flatten(trainer.settings)},
        "vocabulary": trainer.train_tokens.vocabulary.state_dict(),
        "text": trainer.text_format.state(),
        "progress": {
            **dataclasses.asdict(trainer.progress),
            "interval": interval,
            # How far the memory lies behind the loader's position: these tokens are read again.
            "kept": 0 if kept is None else kept[0].shape[1],
            "rooms": rooms,
        },
    }


def restore(trainer: "Trainer", checkpoint: dict[str, Any]) -> None:
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
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.average.load_state_dict(checkpoint["average"])
    load_optimizer(trainer.optimizer, checkpoint["optimizer"])
    trainer.set_learning_rate(checkpoint["scheduler"]["lr"])
    if checkpoint["scaler"] and trainer.dtype == torch.float16:  # a run that had no scaler begins with a new one
        trainer.bptt.scaler.load_state_dict(checkpoint["scaler"])
    progress = dict(checkpoint["progress"])
    interval, kept, rooms = progress.pop("interval"), progress.pop("kept", 0), progress.pop("rooms", [])
    own_share = float(trainer.processes.is_first)  # what all processes had added up is the first one's now
    nll, count = own_share * interval["nll"], own_share * interval["count"]
    trainer.tally.sums.copy_(
        torch.tensor([nll, count, interval["grad_norm"], interval["updates"]], dtype=torch.float64)
    )
    trainer.progress = Progress(**progress)
    trainer.tally.skips.copy_(torch.tensor([trainer.progress.skipped, trainer.progress.skipped_in_a_row]))
    if not trainer.settings.truncation.bptt_adaptive:
        trainer.progress.bptt_backward = 0
    elif trainer.progress.bptt_backward:
        chosen = min(trainer.progress.bptt_backward, trainer.settings.truncation.bptt_backward)
        trainer.progress.bptt_backward = max(chosen, trainer.new_tokens)
        trainer.bptt.context = trainer.progress.bptt_backward - trainer.new_tokens
    if trainer.valid_tokens and checkpoint["validation"] != trainer.valid_tokens.fingerprint():
        # What other text scored is nothing to compare with.
        trainer.average.losses = []
        trainer.progress = dataclasses.replace(
            trainer.progress, validated_at=-1, best_loss=float("inf"), without_improvement=0
        )
    if len(checkpoint["rng"]) == trainer.processes.world_size:
        _set_rng_state(trainer.device, checkpoint["rng"][trainer.processes.rank])
    else:  # other processes drop out otherwise, and otherwise again after the next change
        torch.manual_seed(trainer.settings.run.seed + 1 + trainer.processes.rank + 1_000_003 * trainer.progress.update)
    if trainer.capacity is not None and len(rooms) == trainer.processes.world_size:
        trainer.capacity.rooms = rooms[trainer.processes.rank] or trainer.capacity.rooms
    if other_streams:
        trainer.loader.begin_epoch(checkpoint["loader"]["epoch"])
        return
    trainer.loader.load_state_dict({key: value for key, value in checkpoint["loader"].items() if key != "data"})
    own = trainer.settings.data.batch_size * trainer.settings.data.update_freq
    streams = pytbptt.memory.load(trainer.model.init_memory(trainer.loader.streams), checkpoint["memory"])
    mine = pytbptt.memory.select(streams, slice(trainer.processes.rank * own, (trainer.processes.rank + 1) * own))
    trainer.bptt.states = pytbptt.memory.split(
        pytbptt.memory.to(mine, trainer.device), trainer.settings.data.batch_size
    )
    if kept:
        chunks = trainer.loader.read(trainer.loader.position - kept, trainer.loader.position)
        trainer.bptt.kept = [(chunk.tokens, chunk.reset) for chunk in (chunk.to(trainer.device) for chunk in chunks)]


def changed_regularisation(trainer: "Trainer", checkpoint: dict[str, Any]) -> str:
    """Which settings of dropout and the like are others than the checkpoint's, for the log; empty if none."""
    found, now = checkpoint["config"]["model"], checkpoints.model_state(trainer.model_config)
    changed = [key for key in OF_REGULARISATION if key in now and found.get(key) != now[key]]
    return ", ".join(f"--{key.replace('_', '-')} {now[key]} from here on, {found.get(key)} so far" for key in changed)


def begin_with_weights(trainer: "Trainer", path: str) -> None:
    """Give a new run the weights of a checkpoint, its averaged ones where it has them.

    Raises:
        InputError: of another architecture or vocabulary.
    """
    flag = f"--finetune-from-model {path}"
    loaded = checkpoints.load_checkpoint(path)
    found, expected = (checkpoints.model_state(config) for config in (loaded.model.config, trainer.model_config))
    differing = [key for key in found if key not in OF_REGULARISATION and found[key] != expected.get(key)]
    if differing:
        wanted = " ".join(f"--{key.replace('_', '-')} {found[key]}" for key in differing)
        raise InputError(f"{flag}: found a model of other settings, expected its own: {wanted}")
    if loaded.vocabulary.fingerprint() != trainer.train_tokens.vocabulary.fingerprint():
        raise InputError(f"{flag}: found another vocabulary than the data's, expected data prepared with its dict.txt")
    trainer.model.load_state_dict(loaded.model.state_dict())


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """As its load_state_dict, but the learning rate stays where this device needs it.

    Raises:
        ValueError: the state is of other parameters.
    """
    own = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in optimizer.param_groups]
    groups = [{**group, **kept} for group, kept in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _check_belongs(trainer: "Trainer", checkpoint: dict[str, Any]) -> None:
    advice = "begin anew with --restart, or choose another --save-dir"
    found = checkpoint["config"]["model"]
    for key, expected in checkpoints.model_state(trainer.model_config).items():
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


def _other_streams(trainer: "Trainer", checkpoint: dict[str, Any]) -> str:
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


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
