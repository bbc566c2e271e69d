"""Running a plan inside transformers: registration, binding, attention, cache, patched checkpoints. Importing it registers."""

from sparsesearch.runtime.diffusion.loading import register as register_diffusers
from sparsesearch.runtime.registration import register

register()
register_diffusers()
