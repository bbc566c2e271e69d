"""Plans on diffusers transformers: specialised attention processors, and what a call knows about its tokens and its step.

Needs the extra `diffusers`; nothing here is imported before a diffusers model is at hand.
"""
