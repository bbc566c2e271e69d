"""What transformers calls a cache: `cache` from 5.24 on, `past_key_values` before; the old name warns until 5.40, then goes."""

from dataclasses import fields
from typing import Literal

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_KEYWORD: Literal["cache", "past_key_values"] = (
    "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"
)
"""The argument of a model's forward, and the field of what it returns, in the installed release."""
