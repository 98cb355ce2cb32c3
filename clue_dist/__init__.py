"""Cross-Linked Unified Embedding of single cells measured in different, incomplete modalities."""

__version__ = "0.1.0"
