"""Malformed fragments files, and peaks that are to be binned: refused, or counted as a slow reading of them counts."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from tests.benchmarks.hostile.changes import CELLS
from tests.benchmarks.hostile.hdf5 import in_bytes
from tests.benchmarks.hostile.inputs import Holds, converted
from tests.benchmarks.hostile.trial import Trial
from tests.unit.prep_helpers import make_counts, write_h5ad

WIDTH = 1000
LENGTH = 2**32  # base pairs: no chromosome has more


def ready(base: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(400):
        start, cell = int(rng.integers(20_000)), number % CELLS
        lines.append(
            f"chr{rng.integers(1, 4)}\t{start}\t{start + int(rng.integers(1, 1500))}\tc{cell}\t1"
        )
    (base / "fragments.tsv").write_text("# id=sample\n" + "\n".join(lines) + "\n")
    peaks = make_counts(CELLS, 20)
    peaks.columns = [f"chr{j % 3 + 1}:{700 * j}-{700 * j + 500}" for j in range(20)]
    write_h5ad(base / "peaks.h5ad", peaks)


# --- what is tried ---


def fragments(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    """Two of three are fragments files, every third one is an h5ad of peaks."""
    if number % 3 == 2:
        return _peaks(base, folder, number // 3, rng)
    content, must = (base / "fragments.tsv").read_bytes(), frozenset[str]()
    path = folder / ("fragments.tsv.gz" if number % 2 else "fragments.tsv")
    if number % 4 == 3:
        path.write_bytes(gzip.compress(content) if number % 2 else content)
        told = in_bytes(path, rng, folder)
    else:
        told = list(LINES)[number % len(LINES)]
        change, refuse = LINES[told]
        text = change(content)
        path.write_bytes(gzip.compress(text) if number % 2 else text)
        must = frozenset({"convert"} if refuse else ())
    words = [f"atac={path}", "--bins", f"atac={WIDTH}"]
    tried = partial(
        converted, words, folder, _counted(base / "fragments.tsv"), lambda: _counted(path)
    )
    return Trial(f"{path.name}: {told}", {"convert": tried}, must)


def _peaks(base: Path, folder: Path, number: int, rng: np.random.Generator) -> Trial:
    told = list(NAMES)[number % len(NAMES)]
    name, refuse = NAMES[told]
    table = ad.read_h5ad(base / "peaks.h5ad")
    names = table.var_names.tolist()
    names[int(rng.integers(len(names)))] = name
    table.var_names = names
    path = folder / "peaks.h5ad"
    table.write_h5ad(path)
    tried = partial(
        converted,
        [f"atac={path}", "--bins", f"atac={WIDTH}"],
        folder,
        Holds({}),
        lambda: _binned(path),
    )
    return Trial(f"peaks: {told}", {"convert": tried}, frozenset({"convert"} if refuse else ()))


# --- what they hold ---


def _counted(path: Path) -> Holds:
    """One line after another, with Python's own numbers."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return _as_table(
        (cell, where, int(lo), int(hi), 1)
        for where, lo, hi, cell in (x.split("\t")[:4] for x in lines)
    )


def _binned(path: Path) -> Holds:
    """The counts of a table of peaks, by the bin that holds the middle of each."""
    table = ad.read_h5ad(path)
    values, places = table.X.toarray(), [re.split("[:_-]", name) for name in table.var_names]
    return _as_table(
        (cell, *places[j][:1], int(places[j][1]), int(places[j][2]), values[i, j])
        for i, cell in enumerate(table.obs_names)
        for j in range(len(places))
    )


def _as_table(counted: Iterable[tuple[str, str, int, int, float]]) -> Holds:
    """counted: cell, chromosome, start, end, how many."""
    counts: Counter[tuple[str, str]] = Counter()
    for cell, chromosome, start, end, times in counted:
        at = (start + end) // 2 // WIDTH
        counts[cell, f"{chromosome}:{at * WIDTH}-{(at + 1) * WIDTH}"] += int(times)
    cells, bins = (list(dict.fromkeys(key[i] for key in counts)) for i in (0, 1))
    return Holds({"atac": pd.DataFrame([[counts[c, b] for b in bins] for c in cells], cells, bins)})


# --- what is done to them ---


def _line(line: str) -> Callable[[bytes], bytes]:
    """Instead of the tenth fragment."""

    def change(content: bytes) -> bytes:
        lines = content.split(b"\n")
        return b"\n".join([*lines[:10], line.encode(), *lines[11:]])

    return change


LINES: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "an end beyond every chromosome": (_line(f"chr1\t10\t{LENGTH + 1}\tc0\t1"), True),
    "an end on another chromosome's bins": (_line("chr1\t10\t43000000000000\tc0\t1"), True),
    "an end of 63 bits": (_line(f"chr1\t5\t{2**63 - 1}\tc0\t1"), True),
    "an end of 20 digits": (_line(f"chr1\t5\t{'9' * 20}\tc0\t1"), True),
    "an end of 5,000 digits": (_line(f"chr1\t5\t{'9' * 5000}\tc0\t1"), True),
    "the largest end": (_line(f"chr1\t{LENGTH - 10}\t{LENGTH}\tc0\t1"), False),
    "turned": (_line("chr1\t500\t10\tc0\t1"), True),
    "of no length": (_line("chr1\t10\t10\tc0\t1"), True),
    "negative": (_line("chr1\t-10\t10\tc0\t1"), True),
    "a fraction": (_line("chr1\t1.5\t10\tc0\t1"), True),
    "NaN": (_line("chr1\tnan\t10\tc0\t1"), True),
    "a text for a number": (_line("chr1\tten\t20\tc0\t1"), True),
    "digits of another script": (_line("chr1\t²\t20\tc0\t1"), True),
    "no barcode": (_line("chr1\t10\t20\t\t1"), True),
    "three columns": (_line("chr1\t10\t20"), True),
    "blanks for tabs": (_line("chr1 10 20 c0 1"), True),
    "ten columns": (_line("chr1\t10\t20\tc0\t1" + "\tx" * 5), False),
    "a barcode of 5,000 letters": (_line(f"chr1\t10\t20\t{'x' * 5000}\t1"), True),
    "an endless barcode": (_line(f"chr1\t10\t20\t{'x' * 5_000_000}\t1"), True),
    "a barcode like a path": (_line("chr1\t10\t20\t../../c0\t1"), False),
    "a chromosome like a path": (_line("../../chr1\t10\t20\tc0\t1"), False),
    "a chromosome of other scripts": (_line("chr²🧬\t10\t20\tc0\t1"), False),
    "a chromosome of 5,000 digits": (_line(f"chr{'9' * 5000}\t10\t20\tc0\t1"), False),
    "a quote that never ends": (_line('chr1\t10\t20\t"c0\t1'), False),
    "nothing but comments": (lambda content: b"# a\n" * 50, True),
    "a comment in the midst": (_line("# a comment"), True),
    "nothing": (lambda content: b"", True),
    "carriage returns": (lambda content: content.replace(b"\n", b"\r\n"), False),
    "a mark of byte order": (lambda content: b"\xef\xbb\xbf" + content, False),
    "in UTF-16": (lambda content: content.decode().encode("utf-16"), True),
    "one endless line": (lambda content: content + b"1" * 5_000_000, True),
    "cut in a line": (lambda content: content[:-9], True),
    "no last line end": (lambda content: content.rstrip(), False),
}
NAMES: dict[str, tuple[str, bool]] = {  # of one peak
    "an end of 20 digits": ("chr1:5-" + "9" * 20, True),
    "an end of 63 bits": (f"chr1:5-{2**63 - 1}", True),
    "ends whose sum has 64 bits": (f"chr1:{9 * 10**18}-{9 * 10**18 + 10}", True),
    "the largest end": ("chr1:9999999000-9999999999", False),
    "a chromosome of other digits": ("chr²:5-9", False),
    "a chromosome of Arabic digits": ("chr٣:5-9", False),
    "other digits": ("chr1:٣-٩", True),
    "negative": ("chr1:-5-9", True),
    "no chromosome": (":5-9", True),
    "no end": ("chr1:5-", True),
    "a gene": ("GATA1", True),
    "nothing": ("", True),
    "a line end": ("chr1:5-9\n", False),
    "a chromosome like a path": ("../../chr1:5-9", False),
    "a chromosome of 5,000 digits": (f"chr{'9' * 5000}:5-9", False),
}
