"""Answers of a model with and without its adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import lifecycle
from ..tuner.files import read_config
from .data import encode_prompt


def load_adapted(base: str, adapter: str | os.PathLike[str], dtype: str = "auto") -> Any:
    """A causal language model with a saved adapter, on the CUDA device if there is one."""
    from transformers import AutoModelForCausalLM

    read_config(adapter)  # a wrong path is said before the model is loaded
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    lifecycle.load(model, adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Continue prompts without and with the adapter.

    Args:
        model: a transformers model with an adapter; it is left in evaluation mode with the adapter at work.
        chat: wrap prompts in the chat template.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, from ``seed``.

    Returns:
        ``prompt``, ``base`` and ``adapted`` for each prompt.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"need max_new_tokens >= 1 and temperature >= 0, got {max_new_tokens} and {temperature}")
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    how: dict[str, Any] = {
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_p": None,
        "top_k": None,
    }

    def answer(prompt: str) -> str:
        ids = torch.tensor([encode_prompt(prompt, tokenizer, chat=chat)], device=model.device)
        torch.manual_seed(seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        limits = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends), "pad_token_id": pad}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **how)
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    answers = []
    for prompt in prompts:
        with without_adapters(model):
            base = answer(prompt)
        answers.append({"prompt": prompt, "base": base, "adapted": answer(prompt)})
    return answers


@contextmanager
def without_adapters(model: Any) -> Any:
    """The bare model for a while."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()
