"""Malformed Matrix Market folders, tables and fragments files, and peaks to be binned.

Each is refused, or converted into what SciPy and a slow reading of the lines find.
"""

import csv
import gzip
import io
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random

import anndata as ad
import pandas as pd
import scipy.io
import scipy.sparse as sp

from tests.benchmarks.hostile import changes
from tests.benchmarks.hostile.changes import evaluate, list_edits, spoil_bytes
from tests.benchmarks.hostile.hdf5 import CELLS
from tests.benchmarks.hostile.inputs import Contents, split_types, try_conversion
from tests.benchmarks.hostile.trial import Trial
from tests.unit.prep_helpers import make_counts, write_h5ad

MTX, TABLES, FRAGMENTS, PEAKS = map(list_edits, ("mtx", "table", "fragments", "peaks"))
REPLACED = ("gone", changes.OTHER_KIND, "a pipe", "a link to itself", "a link to nothing")
BANNER = b"%%MatrixMarket matrix coordinate integer general"
WIDTH = 1000  # of bins
BINS = ("--bins", f"atac={WIDTH}")


def read_text(path: Path) -> bytes:
    """The content of a file, gzipped or not."""
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def write_text(path: Path, content: bytes) -> None:
    """Write a file, gzipped if its name says so."""
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def edit_text(path: Path, expression: str, sound: Path | None = None) -> None:
    """Edit a file, or a copy of a sound one, by its bytes, `v`, or its lines, `rows`."""
    content = read_text(sound or path)
    rows = content.split(b"\n")

    def put(number: int, row: str | bytes) -> list[bytes]:  # in the place of one
        return [*rows[:number], row.encode() if isinstance(row, str) else row, *rows[number + 1 :]]

    def more(*entries: str) -> list[bytes]:  # and told so in the sizes
        features, cells, n = rows[2].split()
        sizes = b"%b %b %d" % (features, cells, int(n) + len(entries))
        return [*rows[:2], sizes, *rows[3:-1], *(entry.encode() for entry in entries), b""]

    def field(row: int, column: int, text: str) -> list[bytes]:  # of a table
        separator = "\t" if b"\t" in rows[0] else ","
        fields = rows[row].decode().split(separator)
        fields[column] = text
        return put(row, separator.join(fields))

    words = {"rows": rows, "put": put, "more": more, "field": field, "BANNER": BANNER}
    changed = evaluate(expression, content, tabs=lambda row: row.replace(" ", "\t"), **words)
    write_text(path, b"\n".join(changed) if isinstance(changed, list) else changed)


# --- Matrix Market ---


def spoil_mtx(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A folder of files, gzipped or not."""
    form, must = "zipped" if number % 3 == 2 else "mtx", True
    path = Path(shutil.copytree(base / form, folder / "mtx"))
    files = {file.name.partition(".")[0]: file for file in path.iterdir()}
    if number % 4 == 3:
        name = rng.choice(["matrix", "matrix", "features", "barcodes"])
        change, must = f"{name}: {spoil_bytes(files[name], rng)}", False
    elif number % 8 == 6:
        name, how = rng.choice(list(files)), rng.choice(REPLACED)
        changes.replace_path(files[name], how, folder)
        change = f"{name}: {how}"
    else:
        change, must = list(MTX.items())[(number - number // 4) % len(MTX)]
        name, _, expression = change.partition(" = ")
        edit_text(files[name], expression)
    before, must_refuse = partial(read_mtx, base / "mtx"), ["convert"] if must else []
    return try_conversion(f"mtx, {form}: {change}", path, read_mtx, before, must_refuse)


def read_mtx(folder: Path) -> Contents:
    files = {path.name.partition(".")[0]: path for path in folder.iterdir()}
    matrix = sp.csr_matrix(scipy.io.mmread(files["matrix"]).T)
    options = {"sep": "\t", "header": None, "quoting": 3}
    barcodes, features = (pd.read_csv(files[n], **options) for n in ("barcodes", "features"))
    return split_types(matrix, barcodes[0].to_numpy(), features[2].to_numpy())


# --- tables ---


def make_tables(base: Path) -> None:
    """Two tables of the same counts; names of cells are sequences."""
    counts = make_counts(CELLS, 6, 1, "p")
    cells = ("".join("ACGT"[i >> shift & 3] for shift in range(0, 24, 2)) for i in range(CELLS))
    counts.index = pd.Index(cells)
    counts.T.to_csv(base / "adt.csv")
    counts.to_csv(base / "rna.tsv.gz", sep="\t")


def spoil_table(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """A table with cells in columns, or in rows."""
    turn, form = divmod(number, 2)
    path = Path(shutil.copy(base / ("rna.tsv.gz" if form else "adt.csv"), folder))
    if turn % 4 == 3:
        change, must = spoil_bytes(path, rng), False
    else:
        change, must = list(TABLES.items())[(turn - turn // 4) % len(TABLES)]
        edit_text(path, change)
    before, must_refuse = partial(read_table, base / path.name), ["convert"] if must else []
    name = f"{path.name[:3]}="
    return try_conversion(f"{path.name}: {change}", path, read_table, before, must_refuse, name)


def read_table(path: Path) -> Contents:
    """One line after another, with Python's own numbers; each feature has another name."""
    text = re.sub("^(#.*\n)*", "", read_text(path).decode("utf-8-sig"))
    separator = next(mark for mark in "\t;," if mark in text.partition("\n")[0])
    names, *rows = filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    values = [[float(value) for value in row[1:]] for row in rows]
    table = pd.DataFrame(values, [row[0] for row in rows], names[1:])
    modality = path.name[:3]
    return Contents({modality: table.T if modality == "adt" else table})


# --- fragments, and peaks ---


def make_sound(base: Path) -> None:
    """Fragments of three chromosomes, and peaks."""
    rng, lines = Random(0), ["# id=sample"]
    for number in range(400):
        start = rng.randrange(20_000)
        end, cell = start + rng.randrange(1, 1500), number % CELLS
        lines.append(f"chr{rng.randrange(1, 4)}\t{start}\t{end}\tc{cell}\t1")
    (base / "fragments.tsv").write_text("\n".join(lines) + "\n")
    peaks = make_counts(CELLS, 20)
    peaks.columns = [f"chr{j % 3 + 1}:{700 * j}-{700 * j + 500}" for j in range(20)]
    write_h5ad(base / "peaks.h5ad", peaks)


def spoil_fragments(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """Two of three are fragments files, every third one is an h5ad of peaks."""
    if number % 3 == 2:
        return spoil_peaks(base, folder, number // 3, rng)
    sound = base / "fragments.tsv"
    path = folder / f"fragments.tsv{'.gz' if number % 2 else ''}"
    if number % 4 == 3:
        write_text(path, sound.read_bytes())
        change, must = spoil_bytes(path, rng), False
    else:
        change, must = list(FRAGMENTS.items())[number % len(FRAGMENTS)]
        edit_text(path, change, sound)
    what, before = f"{path.name}: {change}", partial(count_fragments, sound)
    must_refuse = ["convert"] if must else []
    return try_conversion(what, path, count_fragments, before, must_refuse, "atac=", BINS)


def spoil_peaks(base: Path, folder: Path, number: int, rng: Random) -> Trial:
    """An h5ad in which one peak has another name."""
    change, must = list(PEAKS.items())[number % len(PEAKS)]
    table, path = ad.read_h5ad(base / "peaks.h5ad"), folder / "peaks.h5ad"
    names = table.var_names.tolist()
    names[rng.randrange(len(names))] = evaluate(change)
    table.var_names = names
    table.write_h5ad(path)
    what, must_refuse = f"a peak called {change}", ["convert"] if must else []
    return try_conversion(what, path, bin_peaks, lambda: Contents({}), must_refuse, "atac=", BINS)


def count_fragments(path: Path) -> Contents:
    """One line after another, with Python's own numbers."""
    lines = read_text(path).decode("utf-8-sig").splitlines()
    fields = (line.split("\t")[:4] for line in lines if line and not line.startswith("#"))
    return count_bins((cell, where, int(lo), int(hi), 1) for where, lo, hi, cell in fields)


def bin_peaks(path: Path) -> Contents:
    """The counts of a table of peaks, by the bin that holds the middle of each."""
    table = ad.read_h5ad(path)
    values, places = table.X.toarray(), [re.split("[:_-]", name) for name in table.var_names]
    return count_bins(
        (cell, where, int(low), int(high), values[i, j])
        for i, cell in enumerate(table.obs_names)
        for j, (where, low, high, *_) in enumerate(places)
    )


def count_bins(counted: Iterable[tuple[str, str, int, int, float]]) -> Contents:
    """Counts by cell and bin; of cell, chromosome, start, end and how many."""
    counts: Counter[tuple[str, str]] = Counter()
    for cell, chromosome, start, end, times in counted:
        low = (start + end) // 2 // WIDTH * WIDTH
        counts[cell, f"{chromosome}:{low}-{low + WIDTH}"] += int(times)
    cells, bins = (list(dict.fromkeys(key[i] for key in counts)) for i in (0, 1))
    table = [[counts[cell, name] for name in bins] for cell in cells]
    return Contents({"atac": pd.DataFrame(table, cells, bins)})
