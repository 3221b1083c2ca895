"""A training system for LFM-3B and its smaller families: `lfm --help`, or docs/ of the project."""

__version__ = "0.1.0"
