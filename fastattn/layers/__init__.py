"""Attention as layers with parameters: Bahdanau (2014), Luong (2015), Vaswani (2017)."""

from fastattn.layers.base import Layer

__all__ = ["Layer"]
