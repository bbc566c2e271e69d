"""Profiling: model + calibration + candidates -> what every candidate would lose in every head."""
