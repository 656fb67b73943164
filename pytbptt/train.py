"""Train a model: python -m pytbptt.train [DATA] [--arch transformer_xl|awd_lstm] ..."""

from pytbptt.runtime.cli import run_with
from pytbptt.training.config import read_command_line
from pytbptt.training.launching import train_on_all

if __name__ == "__main__":
    run_with("python -m pytbptt.train", read_command_line, train_on_all)
