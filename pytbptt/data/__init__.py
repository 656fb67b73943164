"""Tokens on disk: vocabularies, preparation, indexed corpora, and the streams that models are trained on."""

from pytbptt.data.baselines import compressed_bits_per_byte, order1_bits_per_byte, text_bytes
from pytbptt.data.built_in_corpus import python_stdlib
from pytbptt.data.eval_chunks import EvaluationChunk, evaluation_chunks
from pytbptt.data.indexed import IndexedTokens
from pytbptt.data.preparation import PrepareSettings, prepare
from pytbptt.data.splits import load
from pytbptt.data.streams import Chunk, StreamLoader
from pytbptt.data.text_format import TextFormat
from pytbptt.data.text_size import TextSize, recorded_size, text_size
from pytbptt.data.vocabulary import Vocabulary
from pytbptt.data.writer import IndexedWriter, write_indexed

__all__ = [
    "Chunk",
    "EvaluationChunk",
    "IndexedTokens",
    "IndexedWriter",
    "PrepareSettings",
    "StreamLoader",
    "TextFormat",
    "TextSize",
    "Vocabulary",
    "compressed_bits_per_byte",
    "evaluation_chunks",
    "load",
    "order1_bits_per_byte",
    "prepare",
    "python_stdlib",
    "recorded_size",
    "text_bytes",
    "text_size",
    "write_indexed",
]
