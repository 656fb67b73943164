"""What every `python -m pytbptt.X` shares: flags from a dataclass, errors as one line, exit statuses."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.runtime.extras import import_extra

Settings = TypeVar("Settings")

USER_MISTAKE, FAILURE = 2, 1
LOSING = ("--restart", "--reset-streams")
"""Flags that are no guess: what they begin anew is gone."""
INSTEAD_OF_FAIRSEQS = {
    "--restore-file": "a run goes on from its own --save-dir, and --finetune-from-model takes weights alone",
    "--reset-optimizer": "--finetune-from-model takes weights alone, for a new run",
    "--reset-dataloader": "--finetune-from-model takes weights alone, for a new run",
    "--reset-lr-scheduler": "--finetune-from-model takes weights alone, for a new run",
    "--reset-meters": "--finetune-from-model takes weights alone, for a new run",
    "--max-tokens": "a batch is --batch-size streams of --tokens-per-sample tokens",
    "--max-sentences": "it is called --batch-size, as in later releases of fairseq",
    "--max-target-positions": "streams have no end; --tokens-per-sample is the length of a chunk",
    "--save-interval": "--save-interval-updates and --save-interval-minutes say when to save",
    "--keep-last-epochs": "--keep-last keeps former checkpoints",
    "--keep-interval-updates": "--keep-last keeps former checkpoints",
    "--keep-best-checkpoints": "the best one is kept as checkpoint_best.pt",
    "--validate-interval": "--validate-interval-updates says when to validate; without it, every epoch",
    "--disable-validation": "data without a valid split are not validated on",
    "--stop-min-lr": "--max-update or --max-epoch end a run",
    "--stop-time-hours": "--max-minutes ends a run by the clock",
    "--max-lr": "--lr is the peak of the schedule, from which it falls to --min-lr",
    "--share-decoder-input-output-embed": "--tie-weights (or --no-tie-weights) is the model's",
    "--memory-efficient-fp16": "--fp16 or --bf16 is mixed precision",
    "--fp16-init-scale": "the scale finds itself",
    "--update-ordered-indices-seed": "streams are read in order; --seed seeds the rest",
}
"""What to say of flags that fairseq-train has and a run here does not, by their names."""
SMALLER = "the model and a chunk to fit: a smaller --batch-size, --tokens-per-sample or model takes less"


@dataclasses.dataclass
class FairseqSettings:
    """Flags of fairseq that say what is always so here."""

    task: Literal["truncated_bptt_lm"] = "truncated_bptt_lm"
    """Accepted from fairseq's commands."""
    user_dir: str = ""
    """Accepted from fairseq's commands, and not read."""
    required_batch_size_multiple: int = 1
    """Accepted from fairseq's commands, and not needed."""


def run(
    program: str,
    settings_type: type[Settings],
    function: Callable[[Settings], None],
    description: str | None = None,
) -> None:
    """Parse the command line into `settings_type`, call `function`, and turn errors into one line and a status."""
    run_with(program, lambda: parse(program, settings_type, description=description), function)


def run_with(program: str, settings: Callable[[], Settings], function: Callable[[Settings], None]) -> None:
    """`run` for a program that makes its settings in a way of its own."""
    _show_any_character()
    try:
        function(settings())
    except InputError as error:
        _exit(program, error, USER_MISTAKE)
    except RunError as error:
        _exit(program, error, FAILURE)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        found = f"found no room for {tried[1]} more" if tried else "found no room"
        _exit(program, RunError(f"out of memory: {found}, expected {SMALLER}"), FAILURE)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: nothing is left to say, and nobody to say it to
        sys.exit(FAILURE)
    except OSError as error:
        _exit(program, RunError(f"{error.filename or 'output'}: {error.strerror or error}"), FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(
    program: str,
    settings_type: type[Settings],
    arguments: Sequence[str] | None = None,
    default: Settings | None = None,
    description: str | None = None,
) -> Settings:
    """Flags into a dataclass; nested dataclasses share one flat namespace, as fairseq's flags do.

    Args:
        program: how the program is called, for its help.
        settings_type: a dataclass whose fields' docstrings are their help.
        arguments: the command line; default sys.argv[1:].
        default: an instance that decides between the members of a union type and fills in what is not given.

    Raises:
        InputError: an unknown flag (naming the nearest known one) or a value that is none.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    printed, tyro = io.StringIO(), import_extra("tyro")
    try:
        with contextlib.redirect_stderr(printed):
            settings, unknown = tyro.cli(
                settings_type,
                prog=program,
                args=arguments,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
                return_unknown_args=True,
            )
    except SystemExit as error:
        if error.code in (0, None):  # --help has been printed
            raise
        raise InputError(_in_our_words(_first_paragraph(printed.getvalue()))) from None
    refuse_unknown(unknown, flags(settings if default is None else default))
    return typing.cast(Settings, settings)


def refuse_unknown(unknown: Sequence[str], known: Iterable[str], source: str = "") -> None:
    """Raise InputError for the first of `unknown`, naming the nearest of `known`."""
    if not unknown:
        return
    name = unknown[0].split("=", 1)[0]
    if not source and not name.startswith("-"):
        raise InputError(f"{name}: found an argument too many, expected a flag; see --help")
    if not source and (instead := INSTEAD_OF_FAIRSEQS.get(name.replace("_", "-"))):
        raise InputError(f"{name}: unknown flag; {instead}")
    harmless = [k.replace("_", "-") for k in known if k not in LOSING]
    near = difflib.get_close_matches(name.replace("_", "-"), harmless, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see --help for those there are"
    raise InputError(f"{source}{name}: unknown{'' if source else ' flag'}{hint}")


def as_type(kind: Any, value: Any, name: str) -> Any:
    """A value from a file or a literal as a field's type: an integer where a float is asked for, a list as a tuple.

    Raises:
        InputError: by `name`, for a value of another type.
    """
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list | tuple) and (members[-1] is ... or len(value) == len(members)):
        return tuple(as_type(members[0], element, name) for element in value)
    if origin is Literal and isinstance(value, str) and value in members:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    if origin is tuple:
        what = f"a list of {members[0].__name__}" + ("" if members[-1] is ... else f", {len(members)} of them")
    else:
        what = f"one of {', '.join(members)}" if origin is Literal else kind.__name__
    raise InputError(f"{name}: found {json.dumps(value, default=str)}, expected {what}")


def flags(settings: Any) -> list[str]:
    """The flags of a dataclass instance, nested dataclasses included."""
    names: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            names += flags(value)
        elif "Positional" not in str(field.type):
            names.append("--" + field.name.replace("_", "-"))
    return names


def _show_any_character() -> None:
    """Where the standard output cannot show a character of a text or a path, let it show a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _first_paragraph(box: str) -> str:
    """What tyro says in a box of several lines, as one line: its text down to the first rule."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ \t") for line in box.splitlines() if not line.startswith(("╭", "╰", "usage:"))]
    text = []
    for line in lines:
        if line.startswith("───"):
            break
        text.append(line)
    return " ".join(" ".join(text).split()) or "the command line could not be read; see --help"


def _in_our_words(text: str) -> str:
    """tyro's words for a value that does not fit, as found and expected; its own where it says something else."""
    for pattern, words in (
        (r"Error parsing (--[\w-]+): .*(int)\(\) with base 10: '(.*)'$", r"\1: found \3, expected \2"),
        (r"Error parsing (--[\w-]+): could not convert string to (float): '(.*)'$", r"\1: found \3, expected \2"),
        (
            r"invalid choice '(.*)' for argument '(--[\w-]+)'\. (Expected one of) \((.*?),?\)\.?$",
            r"\2: found \1, \3 \4",
        ),
        (r"Missing value for argument '(--[\w-]+)'.*", r"\1: found no value, expected one"),
        (
            r"Error parsing (--[\w-]+): Could not find valid parse for arguments: (.*)",
            r"\1: found \2, expected what --help says",
        ),
    ):
        if match := re.fullmatch(pattern, text):
            return match.expand(words).replace("Expected", "expected")
    return text


def _exit(program: str, error: Exception, status: int) -> None:
    sys.stdout.flush()
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
