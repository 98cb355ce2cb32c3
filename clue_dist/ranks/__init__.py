"""This process among the ranks of its job: where they meet, and what they send each other."""

from clue_dist.ranks.ranks import Ranks as Ranks
from clue_dist.ranks.ranks import run_on_first_rank as run_on_first_rank
