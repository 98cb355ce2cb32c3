"""Mutations change what code does, never its texts, and leave a file that Python can read."""

from __future__ import annotations

import ast

from tests.mutate import draw_mutations, list_sites, mutate_file

SOURCE = '''
LIMIT = 3

def find_value(values: list[int], first: int = 0) -> int:
    """Find 1 value."""
    if first < 2 and values:
        raise ValueError(f"{first + 1} is too small", 4)
    print("found", 5)
    values.sort()
    return min(values)
'''


def test_what_is_changed_in_a_function() -> None:
    module = ast.parse(SOURCE)
    mutations = [mutate_file("room", "file", module, site) for site in list_sites(module)]
    changes = [mutation.label.split("  ", 1)[1].split("  ->  ") for mutation in mutations]
    assert all(ast.unparse(module) != mutation.source for mutation in mutations)
    assert ast.unparse(module) == ast.unparse(ast.parse(SOURCE))
    condition = "first < 2 and values"
    assert [change for change in changes if not change[0].startswith("if ")] == [
        [condition, "first < 2 or values"],
        ["first < 2", "first <= 2"],
        ["2", "3"],
        ["2", "1"],
        ["values.sort()", "pass"],
        ["min", "max"],
    ]
    (negated,) = [after for before, after in changes if before.startswith("if ")]
    assert negated.startswith(f"if not ({condition}):")


def test_as_many_mutations_are_drawn_of_each_file() -> None:
    drawn = draw_mutations(1, 30)
    paths = [mutation.path for mutation in drawn]
    assert len(set(paths)) >= 20
    assert max(map(paths.count, paths)) - min(map(paths.count, paths)) <= 1
    for mutation in drawn:
        compile(mutation.source, mutation.path, "exec")
