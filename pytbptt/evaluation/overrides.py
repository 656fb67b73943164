"""Command-line overrides of a checkpoint's settings."""

import ast
import sys
from typing import Any

from pytbptt.checkpoint import LoadedCheckpoint
from pytbptt.data import TextFormat
from pytbptt.data.text_format import RESET_AT_DOCUMENTS, RESET_AUTO, RESET_NEVER
from pytbptt.errors import InputError


def parse_overrides(text: str) -> dict[str, Any]:
    """A Python dict literal with names as keys.

    Raises:
        InputError: anything else.
    """
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        overrides = None
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise InputError(f"--model-overrides: found {text}, expected a Python dict such as '{{\"mem_len\":640}}'")
    return overrides


def resolve_text_format(loaded: LoadedCheckpoint, reset_on: str, quiet: bool = False) -> TextFormat:
    """The checkpoint's text format, with reset_on overridden unless "auto"; prints a note if it differs from training,
    unless `quiet`.

    Raises:
        InputError: reset_on is neither a mode nor a symbol of the vocabulary.
    """
    trained = loaded.text_format.reset_on
    if reset_on not in (RESET_AUTO, RESET_NEVER, RESET_AT_DOCUMENTS) and reset_on not in loaded.vocabulary:
        raise InputError(f"--reset-on: found {reset_on}, expected auto, none, document or a symbol of the vocabulary")
    if not quiet and RESET_AUTO not in (reset_on, trained) and reset_on != trained:
        print(f"--reset-on {reset_on}: the model was trained with --reset-on {trained}", file=sys.stderr)
    return loaded.text_format.with_reset_on(reset_on)
