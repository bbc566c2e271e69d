"""Attention under a tile choice: the oracle (`reference`) and the fast paths that equal it."""
