"""Which bptt to train with, from measurements: python -m pytbptt.advise [DATA] [--arch …] [--path CHECKPOINT] ..."""

from pytbptt.runtime.cli import run_with
from pytbptt.tuning.run import advise
from pytbptt.tuning.settings import read_advice_command_line

if __name__ == "__main__":
    run_with("python -m pytbptt.advise", read_advice_command_line, advise)
