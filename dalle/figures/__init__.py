"""Figures of real training runs: ``python -m dalle.figures``."""
