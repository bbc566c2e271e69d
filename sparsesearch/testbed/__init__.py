"""The embedded video model `wan-tiny-11m`: the clips it was trained on, how it samples, and how it was trained.

A real `WanTransformer3DModel` small enough to judge a plan by true sampling in seconds on a GPU. Needs the extra `diffusers`.
"""
