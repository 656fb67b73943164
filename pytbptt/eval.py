"""Score a split of the data under a trained model: python -m pytbptt.eval DATA --path CHECKPOINT ..."""

from pytbptt.command import run
from pytbptt.evaluation.evaluate import EvaluationSettings, evaluate

if __name__ == "__main__":
    run("python -m pytbptt.eval", EvaluationSettings, evaluate, __doc__)
