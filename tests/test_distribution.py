"""What is handed on: the source distribution is complete, and what is built from it works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging import metadata

from pytbptt import __version__

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "build.json", "__pycache__")
PARTS = ("csrc", "tests", "benchmarks", "pytbptt", "build_backend", "docs")
STATED_VERSION = re.compile(
    r"""^version\s*[:=]\s*["']?(\d[^"'\s]*)"""  # metadata, CITATION.cff, pyproject.toml
    r"""|^project\(.*\bVERSION\s+(\d[^)\s]*)"""  # CMakeLists.txt
    r"""|\bpytbptt(?:==|[ -]\s*v?)(\d+\.\d+\.\d+)""",  # prose and commands
    re.MULTILINE | re.IGNORECASE,
)
LINKS = (  # Markdown's inline links and pictures, its reference definitions, and HTML's
    re.compile(r"\]\(<?([^)>\s]+)"),
    re.compile(r"^ {0,3}\[[^\]]+\]: *<?([^>\s]+)", re.MULTILINE),
    re.compile(r"""(?:href|src)=["']([^"']+)"""),
)


def relative_links(text: str) -> list[str]:
    """What a Markdown text links to, or shows, of the folder that it lies in; code is left out."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = [link for pattern in LINKS for link in pattern.findall(prose)]
    return [link for link in found if not link.startswith(("https://", "#"))]


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
    names = (
        "setup.py pyproject.toml README.md LICENSE Makefile constraints.txt CMakeLists.txt CONTRIBUTING.md CITATION.cff"
    )
    for name in names.split():
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_an_index_shows(unpacked: Path) -> None:
    """Metadata that an index accepts, with a description that stands alone."""
    shown = metadata.Metadata.from_email((unpacked / "PKG-INFO").read_bytes(), validate=True)
    assert str(shown.version) == __version__
    assert shown.license_expression == "Apache-2.0"
    assert shown.license_files == ["LICENSE"]
    releases = [c.rpartition(" ")[2] for c in shown.classifiers if c.startswith("Programming Language :: Python :: 3.")]
    assert shown.requires_python == f">={releases[0]}"
    assert shown.description_content_type == "text/markdown"
    assert shown.description.startswith("# pytbptt\n")
    assert relative_links(shown.description) == []


def test_every_classifier_is_one_that_an_index_knows(unpacked: Path) -> None:
    known = pytest.importorskip("trove_classifiers", reason="trove-classifiers is missing: pip install 'pytbptt[test]'")
    shown = metadata.Metadata.from_email((unpacked / "PKG-INFO").read_bytes())
    assert set(shown.classifiers) - known.classifiers == set()
    assert set(shown.classifiers) & set(known.deprecated_classifiers) == set()
    assert [c for c in shown.classifiers if c.startswith("License ::")] == []  # refused beside a license expression


def test_no_file_states_another_version(unpacked: Path) -> None:
    """pytbptt.__version__ is the one source; what builds, documents or cites the package agrees with it, if it says."""
    files = [path for folder in (".", "docs", "pytbptt.egg-info") for path in (unpacked / folder).iterdir()]
    stated = [
        (path.name, version)
        for path in files
        if path.is_file()
        for versions in STATED_VERSION.findall(path.read_text(encoding="utf-8"))
        for version in versions
        if version
    ]
    assert stated.count(("PKG-INFO", __version__)) == 2  # its own, and the egg-info's
    assert [(name, version) for name, version in stated if version != __version__] == []


def test_what_documents_link_to_is_in_the_source_distribution(unpacked: Path) -> None:
    links = [
        (path, link) for path in unpacked.rglob("*.md") for link in relative_links(path.read_text(encoding="utf-8"))
    ]
    assert len({path for path, _ in links}) > 2
    assert [(path.name, link) for path, link in links if not (path.parent / link.partition("#")[0]).exists()] == []


def test_the_code_that_an_index_shows_runs(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other data and a narrower model, which is all that is changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data-bin").mkdir()
    shutil.copytree(corpus, "data-bin/mine")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pypi.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace("n_layer=4", "n_layer=2, d_model=12, d_inner=16"), names)
        assert "result" in names or float(names["loss"]) > 0


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
