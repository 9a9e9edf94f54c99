"""Attention as layers with parameters: Bahdanau (2014), Luong (2015), Vaswani (2017)."""

from fastattn.layers.bahdanau import BahdanauAttention
from fastattn.layers.base import Layer
from fastattn.layers.luong import LuongAttention
from fastattn.layers.multihead import MultiHeadAttention
from fastattn.layers.positions import rotary, sinusoidal_positions

__all__ = ["BahdanauAttention", "Layer", "LuongAttention", "MultiHeadAttention", "rotary", "sinusoidal_positions"]
