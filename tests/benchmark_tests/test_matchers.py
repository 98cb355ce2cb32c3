"""The benchmark of matchers: scores of known pairs, the bar on the best of all."""

import numpy as np
import pytest

from tests.benchmarks.matchers import BASE, MATCHERS, Matchers, score_matcher
from tests.benchmarks.split import FOLDS

SET = "hao_mosaic"


@pytest.mark.parametrize("method", MATCHERS)
def test_clean_pairs_are_matched_by_everything(method):
    cells = np.random.default_rng(0).normal(size=(40, 12))
    found = score_matcher(method, cells, cells + 1e-3, np.arange(40) % 2)
    least = 0.05 if method == "shared" else 1.0  # which spreads weight over all neighbours
    assert found["match"] >= least
    assert found["match_within_batch"] >= least


def test_the_best_matcher_is_judged_against_one_neighbour():
    benchmark = Matchers(["--json", "out.json", "--sets", SET])
    values = dict.fromkeys(MATCHERS, 0.1) | {"transport": 0.13}
    records = [
        {"method": method, "data_set": SET, "fold": fold, "seed": 0, "match": value}
        for method, value in values.items()
        for fold in FOLDS
    ]
    (gain,) = benchmark.judge(records)
    assert gain["name"].startswith(f"{SET}: matching score of transport")
    assert (gain["value"], gain["holds"]) == (pytest.approx(1.3), True)
    (gain,) = benchmark.judge([record for record in records if record["method"] != BASE])
    assert gain["holds"] is None


def test_no_matcher_has_packages_of_its_own():
    assert Matchers(["--json", "out.json", "--sets", SET]).list_extras() == {}
