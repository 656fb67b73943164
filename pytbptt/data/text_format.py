"""What a document is and where memory is reset. Stored with prepared data and in checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytbptt.errors import InputError
from pytbptt.runtime.atomic import atomic_write_bytes
from pytbptt.runtime.renamed import Renamed

if TYPE_CHECKING:
    from torch import Tensor

    from pytbptt.data.vocabulary import Vocabulary

DocumentUnit = Literal["file", "line", "blank"]
"""What a document is: a whole file, a line, or what blank lines separate."""

TEXT_FORMAT = "text.json"
RESET_NEVER, RESET_AT_DOCUMENTS, RESET_AUTO = "none", "document", "auto"


@dataclass(frozen=True)
class TextFormat:
    """The document unit (chosen by prepare) and reset rule (chosen for training); scoring and generation follow it.

    Words have `</s>` after every line. Bytes and BPE have it after every document, in the place of what separates
    documents: a newline, or a run of blank lines.
    """

    documents: DocumentUnit | None = None
    """None: unknown (fairseq's and Megatron-LM's data, and data prepared by older versions)."""
    reset_on: str = RESET_AUTO
    """When to reset memory: "document", "none", or after a symbol; "auto": "document" if the data has documents."""

    @classmethod
    def load(cls, directory: Path) -> TextFormat:
        """Read text.json from a data directory; the default if there is none.

        Raises:
            InputError: not a valid text.json.
        """
        path = directory / TEXT_FORMAT
        try:
            return cls.from_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, AttributeError) as error:  # AttributeError: JSON that is not an object
            raise InputError(f"{path}: found no text format ({error}), expected what prepare writes") from None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TextFormat:
        """The inverse of `state_dict`.

        Raises:
            InputError: an invalid value.
        """
        documents, reset_on = state.get("documents"), state.get("reset_on", RESET_AUTO)
        if documents not in (None, *get_args(DocumentUnit)) or not isinstance(reset_on, str):
            raise InputError(f"text format: found documents {documents!r} and reset_on {reset_on!r}, expected a name")
        return cls(documents, reset_on)

    def state_dict(self) -> dict[str, Any]:
        """The fields as a dict, for a checkpoint."""
        return dataclasses.asdict(self)

    state, from_state = Renamed("state_dict"), Renamed("from_state_dict")
    with_resets, forgets = Renamed("with_reset_on"), Renamed("reset_mask")

    def save(self, directory: Path) -> None:
        """Write text.json, atomically."""
        atomic_write_bytes(directory / TEXT_FORMAT, json.dumps(self.state_dict()).encode() + b"\n")

    def with_reset_on(self, reset_on: str) -> TextFormat:
        """A copy with another reset_on; "auto" keeps the current one."""
        return self if reset_on == RESET_AUTO else dataclasses.replace(self, reset_on=reset_on)

    def reset_mask(self, tokens: Tensor, before: Tensor, vocabulary: Vocabulary) -> Tensor | None:
        """During generation: bool mask, shaped as `tokens`, of tokens before which memory is reset.

        Args:
            tokens: ids.
            before: of each, the id before it.
            vocabulary: of the ids.

        Returns:
            None where it never is.
        """
        if self.reset_on not in (RESET_NEVER, RESET_AT_DOCUMENTS, RESET_AUTO):
            return tokens == vocabulary.index(self.reset_on)
        words = vocabulary.kind == "words"
        if self.reset_on == RESET_NEVER or (words and self.documents not in ("line", "blank")):
            return None
        ends = tokens == vocabulary.EOS
        return ends & (before == vocabulary.EOS) if words and self.documents == "blank" else ends
