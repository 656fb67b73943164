"""Bring a checkpoint of another project home: python -m pytbptt.convert CHECKPOINT [--vocabulary FILE] ..."""

from pytbptt.command import run
from pytbptt.conversion.awd_lstm import from_awd_lstm, from_fastai
from pytbptt.conversion.converting import ConvertSettings, convert
from pytbptt.conversion.fairseq import from_fairseq
from pytbptt.conversion.kimiyoung import from_kimiyoung, from_nvidia
from pytbptt.conversion.transfo_xl import from_transfo_xl, to_transfo_xl

__all__ = [
    "from_awd_lstm",
    "from_fairseq",
    "from_fastai",
    "from_kimiyoung",
    "from_nvidia",
    "from_transfo_xl",
    "to_transfo_xl",
]

if __name__ == "__main__":
    run("python -m pytbptt.convert", ConvertSettings, convert, __doc__)
