"""Which bptt to train with, from measurements: python -m pytbptt.advise [DATA] [--arch …] [--path CHECKPOINT] ..."""

from pytbptt.advice.run import advise
from pytbptt.advice.settings import read_advice_command_line
from pytbptt.runtime.cli import run_with

if __name__ == "__main__":
    run_with("python -m pytbptt.advise", read_advice_command_line, advise)
