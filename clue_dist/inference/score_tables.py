"""scores.json as tables and sentences."""

from __future__ import annotations

import itertools
import json
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clue_dist.errors import ConfigError, format_count, name_argument
from clue_dist.files import parse_path
from clue_dist.metrics import integration, matching

SEEN = "seen_in_training"  # in `about` of the scores: whether the model was trained on the cells
SEEN_WARNING = (
    "The model was trained on this store: these are scores of cells that it has seen, and cells "
    "that it has not seen match less well. To hold cells out, cut the store before training "
    "(`python -m data_prep split STORE ...`), and score the part that is not trained on."
)

JOINT_SCORES = "joint"  # the entry of scores.json about z from everything observed
SCALES = "foscttm: 0 is perfect, lower is better; match, recall10: 1 is perfect, higher is better"
# Entries of a pair that hold FOSCTTM alone, and how many cells it is of.
CONTROLS = WITHIN_TYPE, WITHOUT_DEPTH = ("within_type", "without_depth")
MIXING_SCORES = ("mixing", "mixing_ilisi", "transfer")
JOINT_TITLES = {
    "ilisi": "iLISI of batches",
    "ilisi_random": "of batches dealt at random",
    "kbet": "kBET acceptance",
    "accuracy": "15-NN accuracy",
    "clisi": "cLISI",
    "nmi": "NMI",
    "ari": "ARI",
    "asw": "ASW",
}
COMMON_SPACE = "common_space"  # in `about` of the scores: whether the model has one
NO_SPACE = (
    "no common space, so that profiles of different modalities lie apart: training had too few "
    "cells that link all modalities, or these weights are of before the first validation"
)
HAS_PAIRS = "has_pairs"  # in `about` of the scores: whether two modalities share cells
NO_PAIRS = (
    "matching is left out: no two modalities share two cells of these, so that there is no true "
    "match to look for"
)
NO_SCIB = "kBET of batches, and NMI and ARI of labels, need `pip install 'clue-dist[metrics]'`."
# A score or None, and what chance gives or None.
Comparison = tuple[float | None, float | None]


def list_score_rows(
    result: Mapping[str, Any],
) -> Iterator[tuple[str, str, int, dict[str, Comparison]]]:
    """List how well modalities match, pair by pair and scope by scope.

    Scores of a pair are means over both directions, so that they stand once; what follows them is
    each direction alone.

    Args:
        result: the content of scores.json. That of an earlier version has fewer scopes, and no
            chance.

    Yields:
        The pair as "rna-adt", or a direction as "rna->adt"; the scope; how many cells were scored;
        and each metric beside chance.
    """
    for name, entry in select_unordered_pairs(result).items():
        first, second = name.split("->")
        for scope in (*matching.SCOPES, *(name for name in CONTROLS if name in entry)):
            n_cells = entry[scope].get("cells", entry["cells"])
            chance = entry.get("chance", {}).get(scope, {"foscttm": 0.5})
            yield f"{first}-{second}", scope, n_cells, _compare_scores(entry[scope], chance)
        for direction in (name, f"{second}->{first}"):
            directed = result.get(direction, {}).get("directed", {})
            if "global" in directed:
                scores = _compare_scores(directed["global"], {})
                yield direction, "global", entry["cells"], scores


def list_mixing_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, int, list[float | None]]]:
    """List how the profiles of two modalities mix, pair by pair.

    Args:
        result: the content of scores.json; that of an early version has nothing of it.

    Yields:
        The pair as "rna-adt"; how many cells were looked at; and by MIXING_SCORES the numbers, None
        where one is not known.
    """
    for name, entry in select_unordered_pairs(result).items():
        if "mixing" in entry:
            numbers = [entry.get(score) for score in MIXING_SCORES]
            yield name.replace("->", "-"), entry["mixing_cells"], numbers


def _compare_scores(scores: Mapping[str, Any], chance: Mapping[str, Any]) -> dict[str, Comparison]:
    """Each metric beside what chance gives; None where one is not known."""
    return {
        metric: (scores.get(metric), chance.get(metric) if metric in scores else None)
        for metric in matching.METRICS
    }


def format_scores(result: Mapping[str, Any]) -> str:
    """The scores as tables in text, chance beside those of matching; see `list_warnings`, too."""
    titles = "".join(f"{metric:>10}{'chance':>10}" for metric in matching.METRICS)
    head = f"{'pair':<16}{'scope':<14}{'cells':>9}{titles}"
    lines = [head, "-" * len(head)] if select_pairs(result) else []
    for pair, scope, n_cells, scores in list_score_rows(result):
        values = itertools.chain.from_iterable(scores.values())
        numbers = "".join(f"{format_score(value, ''):>10}" for value in values)
        lines.append(f"{pair:<16}{scope:<14}{n_cells:>9,}{numbers}".rstrip())
    if len(lines) > 2:
        lines.append(SCALES)
    for facts in list_space_facts(result):
        lines += ["", *textwrap.wrap(facts, 100)]
    return "\n".join(lines).strip()


def select_unordered_pairs(result: Mapping[str, Any]) -> dict[str, Any]:
    """Select one entry of scores.json for each pair of modalities, by its first direction."""
    pairs: dict[frozenset[str], str] = {}
    for name in select_pairs(result):
        pairs.setdefault(frozenset(name.split("->")), name)
    return {name: result[name] for name in pairs.values()}


def select_pairs(result: Mapping[str, Any]) -> dict[str, Any]:
    """Select the entries of scores.json that are about ordered pairs of modalities."""
    return {name: entry for name, entry in result.items() if "->" in name}


def list_warnings(result: Mapping[str, Any]) -> list[str]:
    """Say in sentences why scores are doubtful, or lack; nothing of scores of earlier versions."""
    about = result.get("about", {})
    is_alone = len(about.get("modalities", ())) == 1  # and lies apart from nothing
    doubts = {
        SEEN_WARNING: about.get(SEEN),
        NO_SPACE: not (is_alone or about.get(COMMON_SPACE, True)),
        NO_PAIRS: not about.get(HAS_PAIRS, True),
    }
    return [text for text, is_doubtful in doubts.items() if is_doubtful]


def list_space_facts(result: Mapping[str, Any]) -> list[str]:
    """Say in sentences whether z is one space; nothing of scores that an earlier version wrote."""
    facts = []
    for name, entry in select_unordered_pairs(result).items():
        if "mixing" not in entry:
            continue
        numbers = [f"mixing {format_score(entry['mixing'])} (0.5 is perfect)"]
        numbers.append(f"iLISI {format_score(entry['mixing_ilisi'])}")
        if "transfer" in entry:
            numbers.append(f"label transfer {format_score(entry['transfer'])}")
        if left_out := _name_left_out(entry, "batch"):
            numbers.append(f"matching within batches{left_out}")
        names = name.replace("->", " and ")
        cells = format_count(entry["mixing_cells"], "cell")
        facts.append(f"{names}, {cells}: {', '.join(numbers)}")
    joint = result.get(JOINT_SCORES)
    return facts + ([] if joint is None else _list_joint_facts(joint))


def list_joint_scores(joint: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """List the numbers that say how the joint z mixes and keeps apart, by title."""
    titles = JOINT_TITLES | {"ilisi": JOINT_TITLES["ilisi"] + _name_left_out(joint, "batch")}
    scores = [(title, joint[name]) for name, title in titles.items() if name in joint]
    for covariate, entry in joint.get("covariates", {}).items():
        scores.append((f"iLISI of {covariate}{_name_left_out(entry, covariate)}", entry["ilisi"]))
        scores.append((f"of {covariate} dealt at random", entry["ilisi_random"]))
    return scores


def _name_left_out(entry: Mapping[str, Any], covariate: str) -> str:
    """How many cells a score of batches or levels leaves out; nothing where it leaves out none."""
    n_unknown = entry.get("unknown_cells", 0)
    cells = format_count(n_unknown, "cell")
    return f" without {cells} whose {covariate} is unknown" if n_unknown else ""


def _list_joint_facts(joint: Mapping[str, Any]) -> list[str]:
    """What the joint z was found to be, in sentences."""
    facts = [f"joint z, {joint['cells']:,} of the store's {joint['store_cells']:,} cells"]
    if "islands" in joint:
        worst = joint["worst_island"]
        islands = ", ".join(
            f"{name} {format_score(ratio)}{' (the worst)' if name == worst else ''}"
            for name, ratio in joint["islands"].items()
        )
        facts.append(f"islands by pattern (1 is none): {islands}")
    if scores := list_joint_scores(joint):
        facts.append(", ".join(f"{title} {format_score(value)}" for title, value in scores))
    if {"ilisi", "accuracy"} & joint.keys() and not {*integration.SCIB_MEASURES} & joint.keys():
        facts.append(NO_SCIB)
    return ["; ".join(facts)]


def format_score(value: float | None, unknown: str = "unknown") -> str:
    """Format a score with four digits."""
    return unknown if value is None else f"{value:.4f}"


class Scores(dict[str, Any]):
    """What scores.json holds, as a table in a notebook."""

    def __repr__(self) -> str:
        return format_scores(self)


@contextmanager
def name_scores_file(scores: str | Path | Mapping[str, Any] | None) -> Iterator[Path | None]:
    """Name the file that holds scores.

    Args:
        scores: the file; what one would hold, which becomes a file for as long as the context; or
            nothing, which stays nothing.

    Yields:
        Its path.

    Raises:
        ConfigError: what a file would hold is no scores.
    """
    if not isinstance(scores, Mapping):
        yield None if scores is None else parse_path(str(scores))
        return
    _require_scores(scores, "scores")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        path.write_text(json.dumps(scores), encoding="utf-8")
        yield path


def read_scores(path: Path) -> dict[str, Any]:
    """Read scores.json.

    Args:
        path: the file, which may be of an earlier version.

    Returns:
        Its content, from which all tables can be made.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    where = name_argument("scores", path)
    try:
        scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refuse_scores(where, error) from error
    _require_scores(scores, where)
    return scores


def _require_scores(scores: Mapping[str, Any], where: str) -> None:
    """Require what tables can be made of."""
    try:
        format_scores(scores)
        if not (select_pairs(scores) or JOINT_SCORES in scores):
            raise ValueError(f"no pair of modalities, and no {JOINT_SCORES!r}")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _refuse_scores(where, error) from error


def _refuse_scores(where: str, error: Exception) -> ConfigError:
    return ConfigError(
        "the scores cannot be read",
        where=where,
        got=error,
        fix="make them with `clue evaluate`",
    )
