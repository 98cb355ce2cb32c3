"""Change the project in one place at a time, and see whether its unit tests notice.

    python -m tests.mutate --seed 0 --number 72

Draws mutations evenly over the files of ROOMS, and runs each on a copy of the project. A line says
what was changed and which test failed. What is caught stays in the file of --results: a command
that was broken off goes on, and one after new tests tries what survived.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Files by room, and the files of `tests/unit` that catch mutations there, the quickest first.
ROOMS = {
    "plan": ("clue_dist/data/plan.py", "plan"),
    "loader": ("clue_dist/data/loader.py", "loader prep_segments"),
    "posterior": ("clue_dist/model/posterior.py", "posterior clue"),
    "objective": ("clue_dist/losses/objective.py", "objective validate"),
    "checkpoint": (
        "clue_dist/checkpoint/*.py",
        "engine_state saver run_folder keep initial_weights",
    ),
    "manifest": ("clue_dist/store/manifest*.py", "manifest prep_zarr"),
    "reader": (
        "clue_dist/store/reader.py clue_dist/store/segment_arrays.py",
        "rows loader prep_values prep_store",
    ),
    "convert": (
        "data_prep/conver*/*.py data_prep/convert.py",
        "prep_conversion prep_pairing prep_cells prep_values prep_features prep_spelling",
    ),
}
# What is imported once for all processes: the last prepares DeepSpeed. The project's own modules
# are imported by each process anew.
PRELOADED = [
    *("anndata", "hypothesis", "mudata", "numba", "pytest", "safetensors", "tensorstore", "zarr"),
    "clue_dist.deepspeed_internals",
]
PACKAGES = ("clue_dist", "data_prep", "launch", "tests")
COPIED = (*PACKAGES, "configs", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add},
}
SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Texts for people: no test has to know every word of them.
MESSAGE_FUNCTIONS = ("print", "warn", "format_", "__repr__")

_FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Site:
    """A node of a syntax tree and what may stand in its place."""

    owner: ast.AST  # the node above
    field: str  # of the owner
    place: int | None  # in the field, where that is a list
    node: ast.AST
    replacement: ast.AST

    def put_node(self, node: ast.AST) -> None:
        """Put a node in this place."""
        if self.place is None:
            setattr(self.owner, self.field, node)
        else:
            getattr(self.owner, self.field)[self.place] = node


@dataclass(frozen=True)
class Mutation:
    """A file with a change in one place."""

    room: str
    path: str
    label: str  # path:line  before -> after
    source: str  # the whole file


def list_sites(owner: ast.AST, inside: bool = False) -> Iterator[Site]:
    """List what can be changed below a node, in the bodies of functions.

    Args:
        owner: the node.
        inside: whether the node stands in a function.
    """
    inside = inside or isinstance(owner, ast.FunctionDef)
    for field, value in ast.iter_fields(owner):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for place, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or is_text_or_type(node):
                continue
            for replacement in propose_replacements(node) if inside else ():
                yield Site(
                    owner, field, place if isinstance(value, list) else None, node, replacement
                )
            yield from list_sites(node, inside)


def is_text_or_type(node: ast.AST) -> bool:
    """Whether a node holds only messages, errors or types, or the defaults of a function."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.arguments):
        return True
    if isinstance(node, ast.FunctionDef):
        return node.name.startswith(MESSAGE_FUNCTIONS)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        return name.endswith("Error") or name.startswith(MESSAGE_FUNCTIONS)
    return isinstance(node, ast.Expr) and is_text_or_type(node.value)


def propose_replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Make the nodes that could stand in place of a node."""
    if type(node) in SWAPPED:
        yield SWAPPED[type(node)]()
    match node:
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Name(id=name) if name in SWAPPED_NAMES:
            yield ast.Name(SWAPPED_NAMES[name])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.If(test=test, body=body, orelse=orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(test=test, body=chosen, orelse=other):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), test), chosen, other)
        case ast.Expr(value=ast.Call()) | ast.AugAssign(target=ast.Attribute()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute()]):
            yield ast.Pass()


def draw_mutations(seed: int, number: int) -> list[Mutation]:
    """Draw mutations, as many from one file as from another as long as a file has them."""
    queues = []
    for room, (patterns, _) in ROOMS.items():
        for file in sorted(file for pattern in patterns.split() for file in ROOT.glob(pattern)):
            path, module = file.relative_to(ROOT).as_posix(), ast.parse(file.read_text("utf-8"))
            sites = list(list_sites(module))
            random.Random(f"{seed} {path}").shuffle(sites)
            queues.append([(room, path, module, site) for site in sites])
    rounds = range(max(map(len, queues)))
    drawn = [queue[turn] for turn in rounds for queue in queues if turn < len(queue)]
    return [mutate_file(*fields) for fields in drawn[:number]]


def mutate_file(room: str, path: str, module: ast.Module, site: Site) -> Mutation:
    """Write the source of a file in which one place is changed."""
    # An operator has no line and little to read: show what it stands in.
    shown = site.node if isinstance(site.node, ast.expr | ast.stmt) else site.owner
    before = ast.unparse(shown)
    site.put_node(site.replacement)
    source = ast.unparse(module)
    after = ast.unparse(site.replacement if shown is site.node else shown)
    site.put_node(site.node)
    texts = [" ".join(text.split())[:100] for text in (before, after)]
    line = getattr(shown, "lineno", 0)
    column = getattr(shown, "col_offset", 0)
    return Mutation(room, path, f"{path}:{line}:{column}  {texts[0]}  ->  {texts[1]}", source)


class FirstFailure:
    """A plugin of pytest that notes the first test, or file of tests, that fails."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test."""
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file whose tests cannot be collected."""
        if report.failed and not self.name:
            self.name = report.nodeid


def run_tests(copy: Path, names: list[str]) -> None:
    """Run files of `tests/unit` in this process, on a copy of the project."""
    import pytest

    os.setsid()  # whoever ends this process ends those that its tests have started
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    output = os.open(copy / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    files = [f"tests/unit/test_{name}.py" for name in names]
    failure = FirstFailure()
    options = ["-x", f"--basetemp={copy}/temporary", "--hypothesis-seed=0"]
    code = pytest.main([*options, *files], plugins=[failure])
    (copy / "result").write_text(failure.name or (f"exit code {code}" if code else ""))
    os._exit(0)  # threads that a mutation leaves behind must not keep it


def await_tests(copy: Path, room: str, limit: float) -> str:
    """Run the tests of a room. Returns what failed, empty where nothing did."""
    (copy / "result").write_text("the process of the tests")
    process = _FORKS.Process(target=run_tests, args=(copy, ROOMS[room][1].split()))
    process.start()
    process.join(limit)
    is_late = process.is_alive()
    with suppress(ProcessLookupError):  # the tests may have left processes, too
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return "the time limit" if is_late else (copy / "result").read_text()


def copy_project(folder: Path) -> Path:
    """Copy what tests need of the project into a new folder."""
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)  # with the code that numba has compiled
        else:
            shutil.copy2(ROOT / name, folder)
    return folder


def try_mutations(
    mutations: Sequence[Mutation], results: dict[str, str], file: Path, workers: int
) -> None:
    """Run the tests on each mutation, and keep in a file what is found.

    Raises:
        RuntimeError: the tests fail without any mutation.
    """
    copies: SimpleQueue[Path] = SimpleQueue()
    limits: dict[str, float] = {}

    def try_room(room: str) -> None:
        copy, started = copies.get(), time.monotonic()
        failed = await_tests(copy, room, 1800)
        copies.put(copy)
        # Several times what it takes, as other things run on the machine too.
        limits[room] = 60 + 4 * (time.monotonic() - started)
        if failed:
            raise RuntimeError(f"without any mutation {failed} fails: see {copy}/output")

    def try_mutation(mutation: Mutation) -> None:
        copy = copies.get()
        # Kept with its date, by which numba knows the code that it has compiled of this file.
        original = shutil.copy2(copy / mutation.path, copy / "original")
        (copy / mutation.path).write_text(mutation.source)
        failed = await_tests(copy, mutation.room, limits[mutation.room])
        shutil.copy2(original, copy / mutation.path)
        copies.put(copy)
        results[mutation.label] = failed
        file.write_text(json.dumps(results, indent=1))
        print(f"{mutation.label}\n    {failed or 'SURVIVED'}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        for number in range(workers):
            copies.put(copy_project(Path(folder, str(number))))
        list(pool.map(try_room, sorted({mutation.room for mutation in mutations})))
        list(pool.map(try_mutation, mutations))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=72, help="mutations to draw")
    parser.add_argument("--room", choices=ROOMS, help="of the drawn ones, those of one room")
    parser.add_argument("--workers", type=int, default=2, help="mutations tried at a time")
    parser.add_argument("--results", type=Path, default=ROOT / "mutations.json")
    arguments = parser.parse_args()
    drawn = [
        mutation
        for mutation in draw_mutations(arguments.seed, arguments.number)
        if arguments.room in (None, mutation.room)
    ]
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    _FORKS.set_forkserver_preload(PRELOADED)
    open_ones = [mutation for mutation in drawn if not results.get(mutation.label)]
    if open_ones:
        try_mutations(open_ones, results, arguments.results, arguments.workers)
    caught = sum(bool(results[mutation.label]) for mutation in drawn)
    print(f"{caught} of {len(drawn)} mutations are caught: {caught / len(drawn):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
