"""The report of a run: one page that holds all it shows, and its pictures beside it."""

from clue_dist.inference.report.page import write_report as write_report
