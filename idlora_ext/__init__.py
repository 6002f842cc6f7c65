"""ID-LoRA (arXiv 2602.20727): fine-tuning with frozen rows of ``W``, one small shared matrix and a router per layer.

>>> model = idlora_ext.apply(model)          # any nn.Module, in place
>>> print(idlora_ext.summary(model))

``IdLoraConfig`` also works with PEFT's ``get_peft_model`` and transformers' ``add_adapter`` and ``load_adapter``.
"""

from . import tested_versions  # first: under another PEFT what follows may not even be found

# isort: split
from . import native, ops, patches, profiling
from .layer.config import IdLoraConfig
from .lifecycle import Summary, apply, calibrate, load, remove, save, summary, to_lora
from .tuner.mixed_batches import adapter_names
from .tuner.model import IdLoraModel
from .version import __version__

__all__ = [
    "IdLoraConfig",
    "IdLoraModel",
    "Summary",
    "__version__",
    "adapter_names",
    "apply",
    "calibrate",
    "load",
    "native",
    "ops",
    "profiling",
    "remove",
    "save",
    "summary",
    "tested_versions",
    "to_lora",
]

patches.patch()
