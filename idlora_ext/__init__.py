"""ID-LoRA (arXiv 2602.20727): fine-tuning with frozen rows of ``W``, one small shared matrix and a router per layer.

>>> model = idlora_ext.apply(model)          # any nn.Module, in place
>>> print(idlora_ext.summary(model))

``IdLoraConfig`` also works with PEFT's ``get_peft_model`` and transformers' ``add_adapter`` and ``load_adapter``.
"""

from . import tested_versions  # first: under another PEFT what follows may not even be found

# isort: split
from . import integration, native, ops, profiling
from .centering import calibrate
from .checkpoint import load, save
from .config import IdLoraConfig
from .layer_summary import Summary, summary
from .lora_export import to_lora
from .mixed_batches import adapter_names
from .model import IdLoraModel
from .patching import apply
from .restore import remove
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

integration.teach_trainer()
integration.teach_accelerate()
integration.teach_refusals()
