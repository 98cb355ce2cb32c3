"""Tests that need parts of a cluster: skipped where these are missing, but never in CI."""

from __future__ import annotations

import os

import pytest

REQUIRED = "REQUIRE_CLUSTERS"  # set by .ci/run


def needs(lacking: str | None) -> pytest.MarkDecorator:
    """A mark for a whole file. lacking: what this machine lacks, None if nothing.

    Raises:
        RuntimeError: something is missing where it may not.
    """
    if lacking and os.environ.get(REQUIRED):
        raise RuntimeError(f"{REQUIRED} is set, but: {lacking}")
    return pytest.mark.skipif(lacking is not None, reason=lacking or "")


def skip_or_fail(lacking: str) -> None:
    """For what can only be told when the test runs."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but: {lacking}")
    pytest.skip(lacking)
