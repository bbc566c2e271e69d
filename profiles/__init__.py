"""Small reference profiles and baseline plans."""
