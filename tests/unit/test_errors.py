"""The parts of an error stand on lines of their own, whatever they quote."""

from clue_dist.errors import DataError


def test_a_text_of_several_lines_is_not_taken_for_parts_of_the_message() -> None:
    error = DataError("a value is not finite", where="a.mtx", got="nan\n  fix: none", fix="mend it")
    assert str(error).splitlines() == [
        "a value is not finite",
        "  where: a.mtx",
        "  got: nan",
        "      fix: none",
        "  fix: mend it",
    ]
