"""What is handed on: the source distribution is complete, and what is built from it works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytbptt import __version__

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "build.json", "__pycache__")
PARTS = ("csrc", "tests", "benchmarks", "pytbptt")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a source distribution unpacks to, made from a copy of the source tree."""
    folder = tmp_path_factory.mktemp("distribution")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / "tree" / part, ignore=NOT_SOURCE)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder / "tree")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "tree", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"pytbptt-{__version__}.tar.gz"
    shutil.unpack_archive(archive, folder)
    return folder / f"pytbptt-{__version__}"


def test_a_source_distribution_is_complete(unpacked: Path) -> None:
    for part in PARTS:
        expected = {path.relative_to(unpacked.parent / "tree") for path in (unpacked.parent / "tree" / part).rglob("*")}
        missing = sorted(str(path) for path in expected if not (unpacked / path).exists())
        assert missing == []
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "CMakeLists.txt"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.slow
def test_a_wheel_built_from_the_source_distribution_has_kernels_and_no_source(unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", tmp_path]
    subprocess.run([*install, unpacked], env=environment, check=True, capture_output=True)
    installed = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
    assert installed == {"pytbptt", f"pytbptt-{__version__}.dist-info"}
    use = (
        "import pytbptt, torch; from pytbptt.ops import backend, lstm\n"
        "with backend('fused'): lstm(*(torch.zeros(s) for s in ((2, 3, 8), (8, 2), (3, 2), (3, 2))))\n"
        "print(pytbptt.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", use],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'pytbptt' / '__init__.py'}\n"), done.stderr
