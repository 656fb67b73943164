"""How a text becomes documents, and where a model's memory ends: decided once, and carried with data and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytbptt.errors import InputError
from pytbptt.runtime.atomic import replace_file

if TYPE_CHECKING:
    from torch import Tensor

    from pytbptt.data.vocabulary import Vocabulary

Documents = Literal["file", "line", "blank"]
"""What a document is: a whole file, a line, or what blank lines separate."""

TEXT_FORMAT = "text.json"
NO_RESETS, AT_DOCUMENTS, BY_THE_DATA = "none", "document", "auto"


@dataclass(frozen=True)
class TextFormat:
    """What prepare decided of a corpus, and training of a model: everything that reads or writes text keeps to it.

    Words have `</s>` after every line. Bytes and BPE have it after every document, in the place of what separates
    documents: a newline, or a run of blank lines.
    """

    documents: Documents | None = None
    """None: not known, as of data of fairseq and Megatron-LM and of what was made before this was written down."""
    reset_on: str = BY_THE_DATA
    """Memory is forgotten at: "document", "none" (never), or after a symbol; "auto": at documents where data have
    them."""

    @classmethod
    def load(cls, directory: Path) -> TextFormat:
        """Of the data in a directory: its text.json, or the default where there is none.

        Raises:
            InputError: a file that is no such thing.
        """
        path = directory / TEXT_FORMAT
        try:
            return cls.from_state(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, AttributeError) as error:  # the last one for JSON that is no object
            raise InputError(f"{path}: found no text format ({error}), expected what prepare writes") from None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TextFormat:
        """The inverse of `state`.

        Raises:
            InputError: a value that is none of the possible ones.
        """
        documents, reset_on = state.get("documents"), state.get("reset_on", BY_THE_DATA)
        if documents not in (None, *get_args(Documents)) or not isinstance(reset_on, str):
            raise InputError(f"text format: found documents {documents!r} and reset_on {reset_on!r}, expected a name")
        return cls(documents, reset_on)

    def state(self) -> dict[str, Any]:
        """As a few strings, for a checkpoint."""
        return dataclasses.asdict(self)

    def save(self, directory: Path) -> None:
        """Write text.json, atomically."""
        replace_file(directory / TEXT_FORMAT, json.dumps(self.state()).encode() + b"\n")

    def with_resets(self, reset_on: str) -> TextFormat:
        """The same documents; "auto" leaves the resets as they are."""
        return self if reset_on == BY_THE_DATA else dataclasses.replace(self, reset_on=reset_on)

    def forgets(self, tokens: Tensor, before: Tensor, vocabulary: Vocabulary) -> Tensor | None:
        """Where memory is forgotten before a token is read, in text that is being written: bool as `tokens`.

        Args:
            tokens: ids.
            before: of each, the id before it.
            vocabulary: of the ids.

        Returns:
            None where it never is.
        """
        if self.reset_on not in (NO_RESETS, AT_DOCUMENTS, BY_THE_DATA):
            return tokens == vocabulary.index(self.reset_on)
        words = vocabulary.kind == "words"
        if self.reset_on == NO_RESETS or (words and self.documents not in ("line", "blank")):
            return None
        ends = tokens == vocabulary.EOS
        return ends & (before == vocabulary.EOS) if words and self.documents == "blank" else ends
