"""A pytest plugin: PEFT's tests, with ID-LoRA in the place of the methods they list."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import pytest
import torch

from idlora_ext import IdLoraConfig
from idlora_ext.layer.config import Router
from idlora_ext.layer.layer import IdLoraLayer

for name in ("diffusers", "datasets"):  # what their files import, for tests that are not ours
    if importlib.util.find_spec(name) is None:
        stub = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stub.__version__ = "0"
        stub.__getattr__ = lambda attribute: type(attribute, (), {})
        sys.modules[name] = stub


@dataclass
class IdLora(IdLoraConfig):
    """Sizes that fit their models, of the forms the one with most in it, and ``init_weights``, with which their tests
    ask for an adapter that does something."""

    r: int = 2
    num_clusters: int = 1
    router: Router = "linear"
    center: bool = False
    init_weights: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "init_weights"}


def choose_rows(self: IdLoraLayer, adapter_name: str, config: IdLoraConfig, *args: Any, **kwargs: Any) -> None:
    _choose_rows(self, adapter_name, config, *args, **kwargs)
    if not getattr(config, "init_weights", True):
        torch.nn.init.normal_(self.idlora_adapter[adapter_name].B)


_choose_rows = IdLoraLayer.choose_rows
IdLoraLayer.choose_rows = choose_rows

IdLoraConfig.base_mismatch = "warn"  # they make a base model twice and do not ask for the same weights

STATIC = {"router": "static", "center": True}  # the default


def for_task(task_type: str) -> list[Any]:
    always = {"task_type": task_type, "target_modules": "all-linear"}
    if task_type == "FEATURE_EXTRACTION":
        always["exclude_modules"] = ["pooler.dense"]  # not in the output that they look at
    return [(IdLora, always | row) for row in ({}, {"num_clusters": 2, "shared_router": False}, STATIC)]


# Their learning rates are for LoRA: ``scaling`` brings our gradients, quadratic in inputs up to 90, to what they fit.
CUSTOM = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"], "num_clusters": 3, "r": 4}),
    ("MLP", {"target_modules": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "scaling": 0.001}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"], "scaling": 0.01}),
    ("MLP", {"target_modules": "all-linear", "clusters_pattern": {"lin0": 2}, "shared_router": False, "scaling": 0.01}),
    ("MLP", {"target_modules": ["lin0", "lin1"]} | STATIC),
    ("EmbConv1D", {"target_modules": ["conv1d"], "r": 1, "rank_boost": 1, "scaling": 100.0}),
    (
        "EmbConv1D",
        {"target_modules": ["conv1d"], "r": 1, "rank_boost": 1, "scaling": 100.0, "modules_to_save": ["emb"]},
    ),
    ("EmbConv1D", {"target_modules": ["lin0"], "scaling": 100.0}),
]
RANDOM = {"init_weights": False}
LIN0, LIN1 = {"target_modules": ["lin0"]} | RANDOM, {"target_modules": ["lin1"]} | RANDOM

# What takes the place of the lists their tests are parametrised with, by file and name.
ROWS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": [(f"ID-LoRA {n}", model, IdLora, fields) for n, (model, fields) in enumerate(CUSTOM)],
        "ALL_PEFT_CONFIG_CLASSES": [IdLora],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            ("ID-LoRA same", "idlora", IdLora, LIN0 | router, LIN0 | {"num_clusters": 2} | router)
            for router in ({}, STATIC)
        ]
        + [("ID-LoRA different", "idlora", IdLora, LIN0 | router, LIN1 | router) for router in ({}, STATIC)],
        "MIXED_ADAPTER_TEST_CASES": [
            ("ID-LoRA same", IdLora(**LIN0), IdLora(**LIN0, r=4)),
            ("ID-LoRA different", IdLora(**LIN0), IdLora(**LIN1)),
            ("ID-LoRA static", IdLora(**LIN0, **STATIC), IdLora(**LIN0, **STATIC, r=4)),
        ],
    },
    "test_decoder_models": {"ALL_CONFIGS": for_task("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": for_task("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": for_task("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": for_task("SEQ_CLS")},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": for_task("TOKEN_CLS"),
        "QA_CONFIGS": for_task("QUESTION_ANS"),
    },
    "test_config": {"ALL_CONFIG_CLASSES": [(IdLoraConfig, {})], "LAYER_INDEXING_CONFIG_CLASSES": [(IdLoraConfig, {})]},
}
# Tests that are written for LoraConfig, in which it becomes ours: files, or classes.
FOR_LORA = (
    "test_low_level_api", "test_mapping", "test_other", "test_tuners_utils", "test_decoder_models",
    "test_encoder_decoder_models", "test_seq_classifier",
    *(f"test_custom_models.py::Test{name}" for name in ("MultipleActive", "RequiresGrad", "MixedAdapter", "PeftCustom")),
)  # fmt: skip

# Not ours: what they are about.
SKIPPED = {
    "the names, numbers and classes of LoRA's own parameters": (
        r"TestRequiresGrad::test_(requires_grad_(modules|lora|follows)|loading_adapter_preserves)|TestRankAndAlphaPattern|"
        r"test_inject_adapter_in_model$|TestLowLevelFunctional::test_modules_to_save|test_model_status_with|"
        r"test_(module_type|adapter_model_type|peft_types|nb_params)_small|TestTunerStateDictKeyPrefixes::test_prefixes|"
        r"does_not_target_classifier_head|applies_find_target_modules|missing_keys_warning|named_like_peft_prefix\[Lora|"
        r"warns_for_unsharded_state_dict"
    ),
    "LoRA's default targets": "test_module_matching_lora|test_realistic_example|test_add_second_adapter_with_all_linear",
    "embeddings, convolutions and nn.MultiheadAttention, which the method cannot adapt": (
        r"TestModelAndLayerStatus::.*(_large|_irregular|target_parameters|injected_layers)|embed_scale|mha_|multihead|"
        r"resized_embedding|fixes_tie_word_embeddings|plain_lora_and_dora_adapters_merge|"
        "test_targeting_trainable_tokens_raises"
    ),
    "a linear router cannot be merged": r"batches_merged_raises\[ID-LoRA (same|different)",
    "a model of the hub, or of diffusers, of which we have no stand-in": (
        "automatic_modules_to_save|seq_cls_mixed_modules_to_save|test_gpt2_dora|prefix_removal|revision_warning|"
        "transformers_automodel|with_weight_conversion|stable_diffusion|"
        r"test_from_pretrained(_cache_dir)?\[|with_runtime_config"
    ),
}
# Ours behaves otherwise, on purpose. Strict: one that begins to pass is an error too.
DIFFERENT = {
    "a second adapter of the same name is refused: it would throw away the first without a word": (
        r"TestGetPeftModel::test_get_peft_model_(warns_when_reloading|repeated_invocation)"
    ),
    "PeftMixedModel is refused": r"test_mixed_model_raises|rejects_duplicate_name_without_mutation\[True\]",
    "add_weighted_adapter is refused": "test_add_weighted_adapter|modules_to_save_merging_adapters",
    "low_cpu_mem_usage leaves what is compared with the base model on its device": (
        "test_inject_from_state_dict_low_cpu_mem_usage$"
    ),
}


def from_lora(router: str, **fields: Any) -> IdLora:
    """What a user of LoRA writes, for our tests: where it asks for what is LoRA's own, the test is not ours."""
    ours = {"init_weights": fields.pop("init_lora_weights", True) is True}
    ours["dropout"] = fields.pop("lora_dropout", 0.0)
    fields.pop("lora_alpha", None)
    if fields.pop("bias", "none") != "none":
        pytest.skip("LoraConfig.bias")
    known = {field.name for field in dataclasses.fields(IdLora)}
    if own := sorted(name for name, value in fields.items() if name not in known and value):
        pytest.skip(f"LoraConfig.{own[0]}")
    fields = {name: value for name, value in fields.items() if name in known and value is not None}
    return IdLora(rank_boost=1, router=router, **ours, **fields)


def _file(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    _adapt(metafunc.module)
    for name, rows in ROWS.get(_file(metafunc.module), {}).items():
        for mark in metafunc.definition.iter_markers("parametrize"):
            if mark.args[1] is getattr(metafunc.module, name):
                object.__setattr__(mark, "args", (mark.args[0], rows, *mark.args[2:]))


def _adapt(module: Any) -> None:
    package = module.__name__.rpartition(".")[0]
    common, utils = (importlib.import_module(f"{package}.testing_{name}") for name in ("common", "utils"))
    for where in (module, common, utils):
        for name, ours in (
            ("hub_online_once", contextlib.nullcontext),  # it goes online first
            ("_skip_if_merging_not_supported", skip_if_merging_not_supported),
            ("_skip_if_conv1d_not_supported", lambda *_: None),
        ):
            if hasattr(where, name):
                setattr(where, name, ours)


def skip_if_merging_not_supported(model_id: str, config_cls: Any, config_kwargs: dict[str, Any]) -> None:
    if config_kwargs.get("router") != "static":
        pytest.skip("a linear router cannot be merged")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, rest = [], []
    for item in items:
        params = getattr(item, "callspec", None)
        item.ours = bool(params) and any(_is_ours(value) for value in params.params.values())
        for_lora = any(where in item.nodeid for where in FOR_LORA) and _mentions_lora(item)
        (kept if item.ours or for_lora else rest).append(item)
        for reasons, mark in ((SKIPPED, pytest.mark.skip), (DIFFERENT, partial(pytest.mark.xfail, strict=True))):
            for reason, pattern in reasons.items():
                if re.search(pattern, item.nodeid):
                    item.add_marker(mark(reason=reason))
    config.hook.pytest_deselected(items=rest)
    items[:] = kept


def _is_ours(value: Any) -> bool:
    return isinstance(value, IdLoraConfig) or (isinstance(value, type) and issubclass(value, IdLoraConfig))


def _mentions_lora(item: pytest.Item) -> bool:
    if params := getattr(item, "callspec", None):  # rows of other methods
        for value in params.params.values():
            kind = value if isinstance(value, type) else type(value)
            if issubclass(kind, peft.PeftConfig) and kind is not peft.LoraConfig:
                return False
    sources = [item.function, *(f[-1].func for f in item._fixtureinfo.name2fixturedefs.values())]
    return any(re.search(r"\bLoraConfig\b[(,]", inspect.getsource(source)) for source in sources)


@pytest.fixture(autouse=True)
def _ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not request.node.ours:
        router = "static" if "merge" in request.node.nodeid.lower() else "linear"
        monkeypatch.setattr(request.module, "LoraConfig", partial(from_lora, router))
