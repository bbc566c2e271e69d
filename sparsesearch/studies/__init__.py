"""Studies: Optuna over what is not decided per unit, by true evaluations, on one or many machines.

exact front ─> first trials ─> knobs ─> exact search inside each trial ─> replay on held-out sequences ─> front of plans
"""
