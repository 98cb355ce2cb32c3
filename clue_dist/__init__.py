"""clue_dist: Cross-Linked Unified Embedding of single cells, streamed from Zarr, trained with DeepSpeed."""

__version__ = "0.1.0"
