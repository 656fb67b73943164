"""Which files of a checkout are its source, for tests and checks that work on a copy."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("csrc", "tests", "benchmarks", "pytbptt", "build_backend", "docs")
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "build.json", "__pycache__")


def copy_source_tree(target: Path) -> None:
    """Copies the source folders and top-level files to `target`, replacing folders from an earlier copy."""
    for folder in SOURCE_FOLDERS:
        shutil.rmtree(target / folder, ignore_errors=True)
        shutil.copytree(ROOT / folder, target / folder, ignore=IGNORED)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, target)
