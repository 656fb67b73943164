"""Log-probabilities of a text under a model, by line or token: python -m pytbptt.score TEXT --path CHECKPOINT ..."""

from pytbptt.command import run
from pytbptt.evaluation.listing import ListingSettings, list_log_probs

if __name__ == "__main__":
    run("python -m pytbptt.score", ListingSettings, list_log_probs, __doc__)
