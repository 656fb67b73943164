"""Continue a text with a trained model: python -m pytbptt.generate --path CHECKPOINT [--prompt TEXT] ..."""

from pytbptt.command import run
from pytbptt.evaluation.write import GenerationSettings, write

if __name__ == "__main__":
    run("python -m pytbptt.generate", GenerationSettings, write, __doc__)
