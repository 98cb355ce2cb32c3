"""Limits of a measurement that ends at once."""

import argparse

from tests.benchmarks.peers import measure


def parse_limits(**more: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    measure.add_arguments(parser)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    return parser.parse_args(["--seconds=0.05", "--warm=0", *words])
