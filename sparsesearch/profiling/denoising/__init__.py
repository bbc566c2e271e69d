"""Profiling a diffusion transformer: what every candidate changes in every head at a few denoising steps."""
