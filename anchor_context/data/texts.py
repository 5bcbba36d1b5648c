"""Real long text that a machine has: documentation and source trees, whole files, one a document.

    python -m anchor_context.data collect FOLDER

writes FOLDER/train.jsonl and FOLDER/held_out.jsonl, a document a line (`{"text", "source", "path", "package",
"licence"}`), and FOLDER/packages.csv: what was taken of which package, and under which licence it stands.

Guarantees: nothing is downloaded, and nothing cut: a file that is too short, too long, no UTF-8 or more
figures than words is left out, and so is one that was there before. The same machine gives the same files,
and the same text is held out on every machine.
Costs: a walk through the trees, and reading what is taken: some seconds for 100 MB of text.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import site
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zlib import error as zlib_error

from anchor_context.data.licences import Owners
from anchor_context.files import whole


@dataclass(frozen=True)
class Tree:
    """One kind of text, and where machines keep it."""

    name: str
    folders: tuple[str, ...]
    """Absolute paths, `*` standing for a part of a name."""
    suffixes: tuple[str, ...]
    """Each as it is, or with .gz behind it."""


_STDLIB = sysconfig.get_path("stdlib")
TREES = (
    Tree("documentation", ("/usr/share/doc", "/usr/share/vim/*/doc"), (".txt", ".rst", ".md")),
    Tree("manuals", ("/usr/share/info",), (".info", ".info-1", ".info-2", ".info-3", ".info-4")),
    Tree("perl", ("/usr/share/perl", "/usr/share/perl5"), (".pm", ".pl", ".pod")),
    Tree("python library", (_STDLIB,), (".py",)),
    Tree("python packages", (*site.getsitepackages(), "/usr/lib/python3/dist-packages"), (".py",)),
    Tree("headers", ("/usr/include",), (".h", ".hpp")),
    Tree(
        "sources", ("/usr/src", "/usr/share/go-*", "/usr/share/emacs"), (".c", ".rs", ".go", ".el")
    ),
)
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testdata"}
"""Folders inside a tree: another tree's, or more figures and repetitions than text."""
MORE = "linux-doc python3-doc perl-doc vim-runtime golang-src rust-src emacs-el"
"""Debian's packages whose texts lie in the trees (looked up in Debian 12)."""

LONGEST_LINE = 5_000
"""Characters; what has a longer one was written by a program."""
MOST_FIGURES = 0.4
"""The share of digits, punctuation and signs; source code has about 0.25."""
HELD_OUT = 20
"""One document of so many, by its text's hash."""
CHARACTERS_PER_TOKEN = 3.2
"""About: what SmolLM2's tokenizer, of 49,152 tokens, has in what a Debian 12 gave; in a manual it has 4.5."""


@dataclass
class Collected:
    """What `collect_texts` took."""

    train: Path
    held_out: Path
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """tree -> the characters of each of its documents"""
    packages: Counter = field(default_factory=Counter)
    """(tree, package, licence, file with the licence) -> characters"""
    documents: Counter = field(default_factory=Counter)
    """The same keys -> documents"""


def collect_texts(
    folder: Path,
    *,
    characters_per_tree: int = 16_000_000,
    shortest: int = 8_000,
    longest: int = 2_000_000,
    trees: tuple[Tree, ...] = TREES,
) -> Collected:
    """Write `folder`/train.jsonl, held_out.jsonl and packages.csv.

    Args:
        characters_per_tree: at most so many from each tree; which of its files, their paths' hashes say.
        shortest, longest: characters of a document.

    Raises:
        ValueError: no file fits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, owners = Collected(folder / "train.jsonl", folder / "held_out.jsonl"), Owners()
    documents = _documents(trees, characters_per_tree, shortest, longest)
    with whole(found.train) as train, whole(found.held_out) as held_out:
        with train.open("w") as train_stream, held_out.open("w") as held_out_stream:
            for tree, path, text in documents:
                package, licence, told_in = owners.of(path)
                found.lengths.setdefault(tree.name, []).append(len(text))
                found.packages[tree.name, package, licence, told_in] += len(text)
                found.documents[tree.name, package, licence, told_in] += 1
                line = {"text": text, "source": tree.name, "path": str(path)}
                line |= {"package": package, "licence": licence}
                stream = held_out_stream if is_held_out(text) else train_stream
                stream.write(json.dumps(line) + "\n")
        if not found.lengths:
            raise ValueError(
                f"no file of {shortest:,} to {longest:,} characters in "
                f"{', '.join(folder for tree in trees for folder in tree.folders)}; lower --shortest, or "
                f"install texts (Debian: apt install {MORE})"
            )
    with whole(folder / "packages.csv") as unfinished, unfinished.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("tree", "package", "licence", "told in", "documents", "characters"))
        writer.writerows(
            (*key, found.documents[key], characters) for key, characters in found.packages.items()
        )
    return found


def is_held_out(text: str) -> bool:
    return int.from_bytes(_hash(text)[:4]) % HELD_OUT == 0


def _documents(
    trees: tuple[Tree, ...], characters_per_tree: int, shortest: int, longest: int
) -> Iterator[tuple[Tree, Path, str]]:
    """What is taken, each text once."""
    seen = set()
    for tree in trees:
        room = characters_per_tree
        for path in sorted(_files_of(tree, shortest, longest), key=lambda path: _hash(str(path))):
            if room < shortest:
                break
            text = read_document(path)
            if text is None or not shortest <= len(text) <= min(longest, room):
                continue
            digest = _hash(text)
            if digest not in seen:
                seen.add(digest)
                room -= len(text)
                yield tree, path, text


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _files_of(tree: Tree, shortest: int, longest: int) -> Iterator[Path]:
    """The files with the tree's suffixes whose size does not rule them out."""
    suffixes = tuple(s + end for s in tree.suffixes for end in ("", ".gz"))
    for pattern in tree.folders:
        for root in sorted(Path("/").glob(pattern.lstrip("/"))):
            for path in root.rglob("*"):
                if not path.name.endswith(suffixes) or path.is_symlink() or not path.is_file():
                    continue
                if LEFT_OUT & set(path.relative_to(root).parts) or "changelog" in path.name.lower():
                    continue
                size = path.stat().st_size
                if path.suffix == ".gz":
                    size *= 4  # about
                if shortest // 2 <= size <= 4 * longest:
                    yield path


_WORDS = (string.ascii_letters + string.whitespace).encode() + bytes(range(128, 256))


def read_document(path: Path) -> str | None:
    """The file's text; None if it cannot be read, is no UTF-8, or was rather written by a program."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib_error, UnicodeDecodeError):  # other people's files
        return None
    if not text or max(map(len, text.splitlines())) > LONGEST_LINE:
        return None
    figures = len(content.translate(None, delete=_WORDS))
    return None if figures > MOST_FIGURES * len(content) else text


def describe_collected(found: Collected) -> str:
    """What was taken: a line for each tree, their lengths, the licences, and what could be installed."""
    lines = [
        f"{'':16} {'documents':>9} {'million tokens':>15} {'median tokens':>14} {'longest':>9}"
    ]
    for tree, lengths in found.lengths.items():
        tokens = sorted(round(n / CHARACTERS_PER_TOKEN) for n in lengths) or [0]
        lines.append(
            f"{tree:16} {len(lengths):9,} {sum(tokens) / 1e6:15.2f} {tokens[len(tokens) // 2]:14,} "
            f"{tokens[-1]:9,}"
        )
    every = [round(n / CHARACTERS_PER_TOKEN) for lengths in found.lengths.values() for n in lengths]
    by_length = Counter(n.bit_length() - 1 for n in every)
    lines += [
        f"(tokens at {CHARACTERS_PER_TOKEN:g} characters each)",
        "lengths    "
        + ", ".join(f"{2**n:,}+: {by_length[n]:,}" for n in sorted(by_length))
        + " tokens",
    ]
    licences = Counter()
    for (_, _, licence, _), characters in found.packages.items():
        licences[licence] += characters
    lines += [
        "licences   of the most text; packages.csv has them all, with the file that tells each:"
    ]
    lines += [
        f"           {characters / 1e6:6.1f} million characters  {licence}"
        for licence, characters in licences.most_common(8)
    ]
    lines += [
        f"train      {found.train}",
        f"held out   {found.held_out} (one of {HELD_OUT})",
        f"more       Debian has long documents as packages: apt install {MORE}",
    ]
    return "\n".join(lines)
