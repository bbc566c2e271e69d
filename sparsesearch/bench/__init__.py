"""Measurements of kernels on a device, against the fastest alternatives in the same run."""
