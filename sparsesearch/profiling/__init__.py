"""The profiling stage."""
