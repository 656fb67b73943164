"""``python -m pytbptt.prepare``: text files into an indexed corpus."""

from pytbptt.command import run
from pytbptt.data.preparation import PrepareSettings, prepare

if __name__ == "__main__":
    run("python -m pytbptt.prepare", PrepareSettings, prepare)
