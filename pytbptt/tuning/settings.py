"""The settings of `python -m pytbptt.advise`: training's own, and what the measurements need besides."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pytbptt import checkpoint as checkpoints
from pytbptt.errors import InputError
from pytbptt.training.config import BUILT_IN_CORPUS, TrainSettings, read_settings


@dataclass
class AdviceOptions:
    path: str = ""
    """A checkpoint whose weights to measure, and whose settings stand where no flag does; nothing: weights that a
    short training makes, which know less of what lies far back."""
    tolerance: float = 0.1
    """How large the bias of the truncated gradient may be, relative to the whole gradient; below 1."""
    memory_limit: float = 0.0
    """GiB that training may take; 0: four fifths of what is free."""
    minutes: float = 3.0
    """About how long the measurements shall take. Their amounts follow from this and the model's size alone, so that
    they repeat: a slow machine takes longer."""
    train_minutes: float = 0.0
    """Also train on for so many minutes with each of a few bptts, and compare their losses."""
    advice_dir: str = "advice"
    """Where advice.json and advice.png go."""


@dataclass
class AdviceSettings(TrainSettings):
    program: ClassVar[str] = "python -m pytbptt.advise"
    description: ClassVar[str] = (
        "Measure which bptt, batch size and memory length suit a model, its data and this machine. It takes the flags "
        f"of python -m pytbptt.train; without DATA: on the built-in corpus {BUILT_IN_CORPUS}."
    )

    advice: AdviceOptions = field(default_factory=AdviceOptions)

    def check(self) -> None:
        """Raise InputError, by the flag's name, for a value outside its range."""
        super().check()
        options = self.advice
        if not 0 < options.tolerance < 1:
            raise InputError(f"--tolerance: found {options.tolerance}, expected more than 0 and less than 1")
        for name in ("memory_limit", "train_minutes"):
            value = getattr(options, name)
            if not 0 <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')}: found {value}, expected at least 0")
        if not 0 < options.minutes < math.inf:
            raise InputError(f"--minutes: found {options.minutes}, expected more than 0")


def read_advice_command_line(arguments: Sequence[str] | None = None) -> AdviceSettings:
    """The command line's settings; with --path, the checkpoint's stand where no flag does.

    Raises:
        InputError: as `read_settings`, or an unreadable checkpoint.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--path", default="")
    try:
        path = first.parse_known_args(arguments)[0].path
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if not path:
        return read_settings(AdviceSettings, arguments)
    config = checkpoints.read(Path(path))["config"]
    known = {**config["model"], **config["run"]}  # a converted one has no run's settings, but its model's
    return read_settings(AdviceSettings, arguments, {key: known[key] for key in known if key != "config"})
