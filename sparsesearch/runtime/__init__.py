"""Running a plan inside transformers: registration, binding, attention, cache, patched checkpoints."""
