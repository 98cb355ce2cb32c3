"""This process among the ranks of its job: where they meet, and what they send each other."""

from clue_dist.ranks.ranks import Ranks as Ranks
