"""Trains for 300 updates on the built-in corpus; fails unless the test loss is below that of an order-1 model.

A program that CI runs, not a pytest test: it takes minutes and trains with all cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pytbptt.data import load, order1_bits_per_byte


def main() -> None:
    limit = order1_bits_per_byte(load("python-stdlib", "train"), load("python-stdlib", "test"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--max-update", "300", "--validate-interval-updates", "300", "--log-format", "simple"]
        command = [sys.executable, "-m", "pytbptt.train", *arguments, "--save-dir", folder]
        subprocess.run(command, check=True)
        bits_per_byte = json.loads((Path(folder) / "results.json").read_text())["test"]["bits_per_byte"]
    print(f"{bits_per_byte:.3f} bits/byte on the test split, order-1 model: {limit:.3f}")
    if not bits_per_byte < limit:
        sys.exit("the trained model is no better than an order-1 model")


if __name__ == "__main__":
    main()
