"""Pruning: which heads and channels a model can lose, the search that chooses them, and what repairs the rest."""
