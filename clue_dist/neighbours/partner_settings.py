"""How partners are sought across modalities; it imports nothing heavy, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from clue_dist.errors import ConfigError, name_argument
from clue_dist.number_checks import require_number

# What each of them does: `partners.find_partners`.
PartnerMethod = Literal["nearest", "scaled", "shared", "mutual", "transport", "bipartite"]
PARTNER_METHODS: tuple[PartnerMethod, ...] = get_args(PartnerMethod)
MOST_PARTNERS = 1_000  # of a cell, in the competition's format


@dataclass(frozen=True)
class PartnerSettings:
    """How partners are sought."""

    method: PartnerMethod = "scaled"
    n_partners: int = 1  # the most that a cell gets
    n_neighbours: int = 10  # that "scaled", "shared" and "mutual" look at
    n_candidates: int = 30  # nearest profiles that a profile may be a partner of, both ways
    temperature: float = 0.05  # of the weights, in units of cosine similarity
    approximate: bool = False  # whether neighbours come from faiss

    def __post_init__(self) -> None:
        if self.method not in PARTNER_METHODS:
            raise ConfigError(
                "no such way to seek partners",
                where=name_argument("method"),
                got=self.method,
                expected=", ".join(PARTNER_METHODS),
            )
        require_number(name_argument("n_partners"), self.n_partners, 1, MOST_PARTNERS, whole=True)
        require_number("n_neighbours", self.n_neighbours, 1, whole=True)
        require_number("n_candidates", self.n_candidates, 1, whole=True)
        require_number("temperature", self.temperature, above=True)
