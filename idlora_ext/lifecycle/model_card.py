"""The ``README.md`` beside an adapter's files: what they are, and the lines that load them."""

from __future__ import annotations

import os
from pathlib import Path

from peft import LoraConfig, PeftConfig

# What transformers calls the models of PEFT's tasks.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_HEADER = """---
library_name: peft
{base_model}tags:
- id-lora
- peft
---
# {title} of {base}

"""

_ADAPTER = """This adapter was trained with [ID-LoRA](https://arxiv.org/abs/2602.20727). It needs the package
`idlora_ext`, which registers the method with PEFT. Without the import PEFT and transformers say only
`KeyError: 'IDLORA'`.

```python
import idlora_ext  # first
from transformers import {cls}

model = {cls}.from_pretrained("{base}")
idlora_ext.load(model, "path/to/this/directory")
```

Where `idlora_ext` is not to be had, its owner can export it as a plain LoRA, if its router is static:
`idlora export path/to/this/directory --base {base} --to lora --output lora`.
"""

_LORA = """This is a plain LoRA of rank {r}, exported from an adapter of [ID-LoRA](https://arxiv.org/abs/2602.20727).
PEFT alone reads it:

```python
from peft import PeftModel
from transformers import {cls}

model = PeftModel.from_pretrained({cls}.from_pretrained("{base}"), "path/to/this/directory")
```
"""


def model_card(config: PeftConfig) -> str:
    """The text of ``README.md`` for an adapter of ``config``, or for the LoRA it was exported as."""
    path = config.base_model_name_or_path
    on_hub = bool(path) and not os.path.isdir(path)  # the hub refuses a card whose base is a directory of somebody's
    base = path if on_hub else Path(path).name if path else "the base model"
    plain = isinstance(config, LoraConfig)
    return (_HEADER + (_LORA if plain else _ADAPTER)).format(
        base_model=f"base_model: {path}\n" if on_hub else "",
        title="A LoRA" if plain else "An ID-LoRA adapter",
        base=base,
        cls=_CLASSES.get(str(config.task_type or "").removeprefix("TaskType."), "AutoModel"),
        r=getattr(config, "r", None),
    )
