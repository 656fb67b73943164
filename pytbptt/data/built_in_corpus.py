"""The built-in corpus: the source of Python's standard library, as bytes."""

import errno
import hashlib
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pytbptt.data.indexed import token_dtype
from pytbptt.data.text_format import TextFormat
from pytbptt.data.text_size import TextSize, measure_text
from pytbptt.data.vocabulary import Vocabulary
from pytbptt.data.writer import IndexedWriter
from pytbptt.errors import RunError

PYTHON_STDLIB = "python-stdlib"
DATA_ROOT = Path("data-bin")  # relative to the current directory, as in fairseq's examples
SPLITS = ("train", "valid", "test")
# Installed packages, and tests, which are long, repetitive and often not installed.
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def python_stdlib(root: Path = DATA_ROOT) -> Path:
    """Directory of the built-in corpus for the running Python, built if it does not exist.

    Each .py file of the standard library is one document of bytes followed by `</s>`, sorted by relative path. A hash
    of the path assigns the split (94% / 3% / 3%). Concurrent builds use separate directories; the first to finish is
    kept.

    Raises:
        RunError: the library's source is missing or the disk is full.
    """
    directory = root / f"{PYTHON_STDLIB}-{platform.python_version()}"
    if directory.is_dir():
        return directory
    source = Path(sysconfig.get_path("stdlib"))
    files = sorted(source_files(source), key=lambda file: file.relative_to(source).as_posix())
    if not files:
        raise RunError(f"{source}: found no .py files, expected the standard library's source")
    try:
        root.mkdir(parents=True, exist_ok=True)
        temp_dir = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=root))
        try:
            _build(source, files, temp_dir)
            temp_dir.chmod(0o777 & ~_umask())
            temp_dir.rename(directory)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        finally:
            shutil.rmtree(temp_dir, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{directory}: found {error.strerror}, expected to write the built-in corpus there") from None
    return directory


def source_files(source: Path) -> Iterator[Path]:
    for directory, children, names in os.walk(source):
        children[:] = [child for child in children if child not in EXCLUDED_DIRECTORIES]
        yield from (Path(directory, name) for name in names if name.endswith(".py") and Path(directory, name).is_file())


def assign_split(relative_path: str) -> str:
    """The split that a file of the built-in corpus is in, by the hash of its path: does not change when other files are
    added or removed."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 94 else "valid" if bucket < 97 else "test"


def _build(source: Path, files: list[Path], directory: Path) -> None:
    vocabulary = Vocabulary.bytes()
    vocabulary.save(directory)
    TextFormat("file").save(directory)
    for split in SPLITS:
        size = TextSize()
        with IndexedWriter(directory / split, token_dtype(len(vocabulary))) as writer:
            for file in files:
                if assign_split(file.relative_to(source).as_posix()) == split:
                    text = file.read_bytes()
                    size += measure_text(text)
                    writer.add(np.append(vocabulary.encode(text), Vocabulary.EOS))
                    writer.end_document()
        (size + TextSize(writer.tokens)).save(directory / split)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
