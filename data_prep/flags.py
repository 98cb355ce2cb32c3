"""Flags whose value is for every modality (`--layer counts`) or for one (`--layer rna=counts`)."""

from __future__ import annotations
