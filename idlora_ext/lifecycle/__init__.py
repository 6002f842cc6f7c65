"""An adapter from ``apply`` to ``remove``: the public functions."""

from .apply import apply
from .calibrate import calibrate
from .checkpoint import load, save
from .lora_export import to_lora
from .remove import remove
from .summary import Summary, summary

__all__ = ["Summary", "apply", "calibrate", "load", "remove", "save", "summary", "to_lora"]
