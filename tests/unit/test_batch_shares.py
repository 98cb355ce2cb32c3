"""Batches are shared among strata by weight, and each holds every modality."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.data.batch_shares import share_rounds, weigh_strata
from clue_dist.data.plan import CellPlan
from clue_dist.errors import ConfigError

# All patterns of six modalities, as of a mosaic of which 40 cells of 100 have all of them.
VIEWS = ("fac", "fou", "kar", "mor", "pix", "zer")
PATTERNS = {"+".join(p): p for n in range(1, 7) for p in combinations(VIEWS, n)}


def test_few_strata_get_the_whole_rounds_of_earlier_versions() -> None:
    weights = {"rna": 1.56, "adt": 1.64, "rna+adt": 12.8}
    modalities = {stratum: stratum.split("+") for stratum in weights}
    shares = share_rounds(128, 8, weights, modalities)
    assert shares == ({"rna": 8, "adt": 16, "rna+adt": 104}, {})
    even = dict.fromkeys("abc", 0.1)
    assert share_rounds(24, 8, even, even) == (dict.fromkeys("abc", 8), {})


def test_rare_strata_take_turns_by_their_shares() -> None:
    sizes = {"all": 640.0} | {name: 21.0 for name, p in PATTERNS.items() if len(p) == 2}
    sizes |= dict.fromkeys(VIEWS, 53.0) | {"fac+fou": 1.0}
    modalities = PATTERNS | {"all": VIEWS}
    shares = share_rounds(128, 8, sizes, modalities)
    total = sum(sizes.values())
    for stratum, size in sizes.items():
        mean = shares.every_batch[stratum] + 8 * shares.turns.get(stratum, 0)
        assert mean == pytest.approx(128 * size / total)
    assert shares.turns["fac+fou"] < 0.02  # of a round
    plan = CellPlan(0, sizes, shares.every_batch, 8, 2, 4, shares.turns)
    pairs = {
        sum(n for s, n in plan.compose_batch(t).items() if len(modalities[s]) > 1)
        for t in range(99)
    }
    assert max(pairs) - min(pairs) <= 8  # one round


@given(
    st.lists(st.sampled_from(list(PATTERNS)), min_size=1, max_size=30, unique=True),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_batch_holds_every_modality(strata: list[str], data: st.DataObject) -> None:
    lanes = 4
    sizes = {s: data.draw(st.sampled_from([1, 3, 20, 300, 5000])) for s in strata}
    names = {name for stratum in strata for name in PATTERNS[stratum]}
    rounds = data.draw(st.integers(len(names), 20))
    shares = share_rounds(lanes * rounds, lanes, sizes, PATTERNS)
    plan = CellPlan(0, sizes, shares.every_batch, lanes, 2, 4, shares.turns)
    assert plan.batch_size == lanes * rounds
    for step in range(64):
        present = {s for s, n in plan.compose_batch(step).items() if n}
        assert {name for stratum in present for name in PATTERNS[stratum]} == names
    assert all(share > 0 for share in plan.mean_shares.values())


def test_a_modality_of_one_rare_stratum_has_a_round_of_every_batch() -> None:
    shares = share_rounds(64, 8, {"rna": 300, "rna+adt": 1}, {"rna": ["rna"], "rna+adt": VIEWS})
    assert shares == ({"rna": 56, "rna+adt": 8}, {})


def test_too_small_a_batch_shows_the_arithmetic() -> None:
    alone = {name: [name] for name in "abc"}
    with pytest.raises(ConfigError, match=r"16 cells / 8 lanes = 2 rounds, where 3 are needed"):
        share_rounds(16, 8, {"a": 1, "b": 1, "c": 1}, alone)


def test_weights_give_paired_cells_their_share() -> None:
    weights = weigh_strata(
        {"p": 100, "q": 300, "u": 600}, {"p": True, "q": True, "u": False}, 0.5, 64
    )
    assert weights["p"] + weights["q"] == pytest.approx(0.5)
    assert weights["q"] == pytest.approx(3 * weights["p"])
    assert weigh_strata({"u": 10, "v": 30}, {"u": False, "v": False}, "auto", 64) == {
        "u": 10.0,
        "v": 30.0,
    }


@pytest.mark.parametrize(
    ("pairs", "single", "share"),
    [
        (4000, 4000, 0.8),
        (3000, 7000, 0.6),
        (1000, 9000, 0.5),
        (200, 9800, 100 / 512),
        (20, 9980, 10 / 512),
    ],
)
def test_auto_favours_pairs_but_takes_half_of_them_at_most(
    pairs: int, single: int, share: float
) -> None:
    weights = weigh_strata({"p": pairs, "u": single}, {"p": True, "u": False}, "auto", 512)
    assert weights == pytest.approx({"p": share, "u": 1 - share})
