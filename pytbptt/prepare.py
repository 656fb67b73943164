"""`python -m pytbptt.prepare`: text files into an indexed corpus."""

from pytbptt.data.preparation import PrepareSettings, prepare
from pytbptt.runtime.cli import run

if __name__ == "__main__":
    run("python -m pytbptt.prepare", PrepareSettings, prepare)
