"""The parts of an error stand on lines of their own, whatever they quote."""

from clue_dist.errors import DataError, format_count, suggest_names


def test_a_text_of_several_lines_is_not_taken_for_parts_of_the_message() -> None:
    error = DataError("a value is not finite", where="a.mtx", got="nan\n  fix: none", fix="mend it")
    assert str(error).splitlines() == [
        "a value is not finite",
        "  where: a.mtx",
        "  got: nan",
        "      fix: none",
        "  fix: mend it",
    ]


def test_names_that_are_spelled_alike_are_suggested_whatever_their_case() -> None:
    assert suggest_names("DONOR", ["batch", "donor"]) == "did you mean donor?"
    assert suggest_names("cd3", ["CD3.1", "CD3.2", "ACTB"]) == "did you mean CD3.2 or CD3.1?"
    assert suggest_names("donor", []) is None


def test_one_of_something_is_told_in_the_singular() -> None:
    assert [format_count(n, "cell") for n in (0, 1, 1200)] == ["0 cells", "1 cell", "1,200 cells"]
    assert [format_count(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]
