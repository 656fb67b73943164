"""Positions in a corpus at which memory is reset."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytbptt.data.indexed import IndexedTokens, Runs
from pytbptt.data.text_format import RESET_AT_DOCUMENTS, RESET_AUTO, RESET_NEVER
from pytbptt.errors import InputError


class ResetRule:
    """Finds the tokens of a corpus that carry a reset.

    `reset_on`: "document" resets at the separator before each document (its target is the document's first token);
    "none" never; a symbol at each occurrence; None or "auto" uses the corpus's text format ("document" if the index has
    documents, else "none").

    Raises:
        InputError: `reset_on` is none of these.
    """

    def __init__(self, tokens: IndexedTokens, reset_on: str | None) -> None:
        reset_on = tokens.text_format.reset_on if reset_on in (None, RESET_AUTO) else reset_on
        self._positions: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # ascending
        self._symbol: int | None = None
        if reset_on == RESET_AT_DOCUMENTS:
            self._positions = tokens.documents[1:] - 1
        elif reset_on != RESET_NEVER:
            if reset_on not in tokens.vocabulary:
                raise InputError(
                    f"reset_on: found {reset_on!r}, expected document, none or a symbol of the vocabulary of "
                    f"{tokens.prefix}"
                )
            self._symbol = tokens.vocabulary.index(reset_on)

    @property
    def any_resets(self) -> bool:
        """Whether any token of the corpus can carry one."""
        return self._symbol is not None or len(self._positions) > 0

    def mask(self, inputs: NDArray[Any], runs: Runs) -> NDArray[np.bool_]:
        """The resets (B, T) of `inputs` (B, T), which holds `runs` of the corpus."""
        reset = np.zeros(inputs.shape, dtype=np.bool_)
        if self._symbol is not None:
            np.equal(inputs, self._symbol, out=reset)
            return reset
        first = np.searchsorted(self._positions, runs.starts)
        counts = np.searchsorted(self._positions, runs.starts + runs.lengths) - first
        if counts.any():
            run = np.repeat(np.arange(len(counts)), counts)
            offset = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
            positions = self._positions[first[run] + offset]
            reset[runs.rows[run], runs.columns[run] + positions - runs.starts[run]] = True
        return reset
