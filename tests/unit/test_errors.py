"""The parts of an error stand on lines of their own, whatever they quote."""

from clue_dist.errors import DataError, suggest_names


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
