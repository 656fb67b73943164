"""Shared command-line code: flags from dataclasses, one-line error messages, exit codes."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.runtime.extras import import_extra

Settings = TypeVar("Settings")

EXIT_USAGE_ERROR, EXIT_FAILURE = 2, 1
DESTRUCTIVE_FLAGS = ("--restart", "--reset-streams")
"""Flags that discard something: never suggested for a misspelt one."""
FAIRSEQ_REPLACEMENTS = {
    "--restore-file": "a run resumes from its own --save-dir; --finetune-from-model loads the weights only",
    "--reset-optimizer": "--finetune-from-model starts a new run and loads the weights only",
    "--reset-dataloader": "--finetune-from-model starts a new run and loads the weights only",
    "--reset-lr-scheduler": "--finetune-from-model starts a new run and loads the weights only",
    "--reset-meters": "--finetune-from-model starts a new run and loads the weights only",
    "--max-tokens": "a batch is --batch-size streams of --tokens-per-sample tokens",
    "--max-sentences": "it is called --batch-size, as in later releases of fairseq",
    "--max-target-positions": "a stream has no maximum length; --tokens-per-sample is the length of a chunk",
    "--save-interval": "--save-interval-updates and --save-interval-minutes say when to save",
    "--keep-last-epochs": "--keep-last says how many earlier checkpoints to keep",
    "--keep-interval-updates": "--keep-last says how many earlier checkpoints to keep",
    "--keep-best-checkpoints": "the best one is kept as checkpoint_best.pt",
    "--validate-interval": "--validate-interval-updates says when to validate; without it, every epoch",
    "--disable-validation": "there is no validation where the data has no valid split",
    "--stop-min-lr": "--max-update or --max-epoch end a run",
    "--stop-time-hours": "--max-minutes limits the wall time of a run",
    "--max-lr": "--lr is the peak of the schedule, from which it falls to --min-lr",
    "--share-decoder-input-output-embed": "use --tie-weights or --no-tie-weights",
    "--memory-efficient-fp16": "use --fp16 or --bf16 for mixed precision",
    "--fp16-init-scale": "the loss scale adjusts itself",
    "--update-ordered-indices-seed": "streams are read in order; --seed seeds the rest",
}
"""Flags of fairseq-train that do not exist here, and what to use instead."""
OUT_OF_MEMORY_ADVICE = "the model and a chunk to fit: a smaller --batch-size, --tokens-per-sample or model needs less"


@dataclasses.dataclass
class FairseqSettings:
    """Flags of fairseq that ask for what pytbptt always does."""

    task: Literal["truncated_bptt_lm"] = "truncated_bptt_lm"
    """Accepted for fairseq compatibility; no other task exists."""
    user_dir: str = ""
    """Accepted for fairseq compatibility; ignored."""
    required_batch_size_multiple: int = 1
    """Accepted for fairseq compatibility; ignored."""


def run(
    program: str,
    settings_type: type[Settings],
    function: Callable[[Settings], None],
    description: str | None = None,
) -> None:
    """Parse the command line into `settings_type`, call `function`, and report errors by a line and an exit status."""
    run_with_parser(program, lambda: parse(program, settings_type, description=description), function)


def run_with_parser(program: str, settings: Callable[[], Settings], function: Callable[[Settings], None]) -> None:
    """`run` for a program that parses its command line itself."""
    _replace_unencodable_output()
    try:
        function(settings())
    except InputError as error:
        _exit(program, error, EXIT_USAGE_ERROR)
    except RunError as error:
        _exit(program, error, EXIT_FAILURE)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        allocation = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        found = f"found no room for {allocation[1]} more" if allocation else "found no room"
        _exit(program, RunError(f"out of memory: {found}, expected {OUT_OF_MEMORY_ADVICE}"), EXIT_FAILURE)
    except BrokenPipeError:
        sys.stderr.close()  # the reader is gone, and Python would print a second error on exit
        sys.exit(EXIT_FAILURE)
    except OSError as error:
        _exit(program, RunError(f"{error.filename or 'output'}: {error.strerror or error}"), EXIT_FAILURE)
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
        settings_type: a dataclass; field docstrings become help texts.
        arguments: the command line; default sys.argv[1:].
        default: an instance that supplies defaults and selects the member of union types.

    Raises:
        InputError: an unknown flag (naming the nearest known one) or an invalid value.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    printed, tyro = io.StringIO(), import_extra("tyro")
    if {"-h", "--help"} & set(arguments):
        _set_help(settings_type, default)
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
        raise InputError(_rephrase(_first_paragraph(printed.getvalue()))) from None
    reject_unknown(unknown, flag_names(settings if default is None else default))
    return typing.cast(Settings, settings)


def _set_help(settings_type: type[Any], default: Any) -> None:
    """Make every field's docstring its help text, on one line: tyro would break it where the docstring's lines end."""
    help_texts: dict[str, str] = {}
    for base in reversed(settings_type.__mro__[:-1]):
        parsed = import_extra("docstring_parser").parse_from_object(base)
        help_texts.update({entry.arg_name: " ".join(entry.description.split()) for entry in parsed.params})
    for field in dataclasses.fields(settings_type):
        nested = field.default_factory if default is None else type(getattr(default, field.name))
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            _set_help(nested, None if default is None else getattr(default, field.name))
        field.metadata = types.MappingProxyType({**field.metadata, "help": help_texts.get(field.name)})


def reject_unknown(unknown: Sequence[str], known: Iterable[str], source: str = "") -> None:
    """Raise InputError for the first of `unknown`, naming the nearest of `known`."""
    if not unknown:
        return
    name = unknown[0].split("=", 1)[0]
    if not source and not name.startswith("-"):
        raise InputError(f"{name}: found an extra argument, expected a flag; see --help")
    if not source and (instead := FAIRSEQ_REPLACEMENTS.get(name.replace("_", "-"))):
        raise InputError(f"{name}: unknown flag; {instead}")
    candidates = [k.replace("_", "-") for k in known if k not in DESTRUCTIVE_FLAGS]
    nearest = difflib.get_close_matches(name.replace("_", "-"), candidates, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; see --help for the known ones"
    raise InputError(f"{source}{name}: unknown{'' if source else ' flag'}{hint}")


def as_type(field_type: Any, value: Any, name: str) -> Any:
    """Check a value from TOML or a literal against a field's type, converting int to float and list to tuple.

    Raises:
        InputError: a value of another type; the message starts with `name`.
    """
    origin, members = typing.get_origin(field_type), typing.get_args(field_type)
    if origin is tuple and isinstance(value, list | tuple) and (members[-1] is ... or len(value) == len(members)):
        return tuple(as_type(members[0], element, name) for element in value)
    if origin is Literal and isinstance(value, str) and value in members:
        return value
    if field_type is float and type(value) is int:
        return float(value)
    if type(value) is field_type:
        return value
    if origin is tuple:
        expected = f"a list of {members[0].__name__}" + ("" if members[-1] is ... else f", {len(members)} of them")
    else:
        expected = f"one of {', '.join(members)}" if origin is Literal else field_type.__name__
    raise InputError(f"{name}: found {json.dumps(value, default=str)}, expected {expected}")


def flag_names(settings: Any) -> list[str]:
    """The flags of a dataclass instance, nested dataclasses included."""
    names: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            names += flag_names(value)
        elif "Positional" not in str(field.type):
            names.append("--" + field.name.replace("_", "-"))
    return names


def _replace_unencodable_output() -> None:
    """Print a question mark for each character that the standard output cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _first_paragraph(box: str) -> str:
    """The first paragraph of tyro's boxed error message, as one line."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ \t") for line in box.splitlines() if not line.startswith(("╭", "╰", "usage:"))]
    text = []
    for line in lines:
        if line.startswith("───"):
            break
        text.append(line)
    return " ".join(" ".join(text).split()) or "the command line could not be read; see --help"


def _rephrase(text: str) -> str:
    """tyro's messages about invalid values in the form "found …, expected …"; other messages unchanged."""
    for pattern, replacement in (
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
            return match.expand(replacement).replace("Expected", "expected")
    return text


def _exit(program: str, error: Exception, status: int) -> None:
    sys.stdout.flush()
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
