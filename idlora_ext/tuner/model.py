"""``IdLoraModel``: PEFT's tuner for ID-LoRA. It finds the layers, replaces them, and has their rows chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import register_peft_method
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base import peft_internals, sharding
from ..base.experts import FUSED_FROM, UnfusedExperts, can_unfuse, fused_parameters
from ..base.peft_internals import BaseTuner, ExcludedModule, check_target_module_exists, get_quantization_kwargs
from ..base.weight import is_linear, linear_shape, stored
from ..layer.config import IdLoraConfig, fit_rank
from ..layer.layer import IdLoraLayer, Linear
from . import choosing, hooks, mixed_batches, refusals, targeting
from .hooks import take_hooks_off
from .mixed_batches import adapter_names
from .names import brief
from .refusals import refuse_existing, refuse_foreign_layers, unsupported
from .restore import ModelState, fuse, remember_trainable
from .verify import forget_transformers_load, verify, verify_transformers_load

_COMPILED = "_orig_mod."  # what torch.compile puts before every name, and PEFT leaves out when it has a state dict


class IdLoraModel(BaseTuner):
    """Adapts the targeted linear layers of a model, in place: ``y = y0 + scaling * concat_j(B z^(j))``.

    Made by ``get_peft_model``, ``inject_adapter_in_model``, transformers' ``add_adapter`` and
    :func:`idlora_ext.apply`. Whatever fails on the way, the model is left exactly as it was.

    Args:
        model: any ``nn.Module``.
        peft_config: the adapter's settings; the object is kept, as PEFT does, see :meth:`IdLoraConfig.begin`.
        adapter_name: its name.
        low_cpu_mem_usage: PEFT's: parameters on the meta device, to be filled from a file.
        state_dict: PEFT's: adapt the layers whose names occur in it.
        progress: show a bar while clustering.

    Raises:
        ValueError: an adapter of that name exists; targets are unsupported or too narrow (all are named); weights that
            cannot be clustered.
    """

    prefix = "idlora_"
    tuner_layer_cls = IdLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: IdLoraConfig | dict[str, IdLoraConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self._progress = progress
        # PEFT replaces a configuration of the same name before it calls inject_adapter: refuse, and remember, first.
        refuse_existing(model, adapter_name)
        self._before: dict[str, ModelState] = {adapter_name: ModelState(model)}
        with warnings.catch_warnings():
            # PEFT warns of any second adapter on an injected model; several adapters are an ordinary thing.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        before = self._before.get(adapter_name)
        if before is None:  # a further adapter of a PeftModel, which has noted the configuration already
            refuse_existing(model, adapter_name)
            before = ModelState(model)
            before.configs.pop(adapter_name, None)
        config = self.peft_config[adapter_name]
        settings, asked = config.begin(), config.target_modules
        self._new: list[tuple[str, IdLoraLayer]] = []
        self._unsupported: dict[str, list[str]] = {}
        self._shrunk: dict[str, list[str]] = {}
        try:
            remember_trainable(model)
            self._names: dict[int, list[str]] = {}
            for name, module in model.named_modules(remove_duplicate=False):
                self._names.setdefault(id(module), []).append(name.removeprefix(_COMPILED))
            try:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
                hooks.refuse_adapter_names(model)
                hooks.watch_padding(model)
                fuse(model)  # experts opened in vain: only some layers, or some of the products, were targeted
                self._report(config, adapter_name)
            except Exception as error:
                if not config.index_stored:
                    choosing.fail(error)
                raise
            if not config.index_stored:
                self._choose_rows(config, adapter_name)
        except BaseException:
            before.restore()
            vars(config).clear()
            vars(config).update(settings)
            raise
        if config.index_stored:
            self._before[adapter_name] = before  # until the tensors have been loaded and verified
            verify_transformers_load(model, before, functools.partial(verify, model, config, adapter_name))
        else:
            self._before.pop(adapter_name, None)
            config.made = (asked, config.target_modules)
        del self._new, self._unsupported, self._shrunk, self._names

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Open the fused experts that are targeted, and have "all-linear" mean quantised layers too.

        PEFT calls this before it resolves "all-linear", to ``nn.Linear`` and ``Conv1D`` only, and lists the modules of
        the model. What looks like fused linear layers, is targeted and cannot be opened is an error: never silently
        left frozen. Nor are layers that another tuner has adapted, which PEFT would not count as linear.
        """
        refuse_foreign_layers(peft_config, model)
        unsupported = []
        for name, module in list(model.named_modules()):
            parent, _, child = name.rpartition(".")
            foreign = False
            if child == "base_layer":
                foreign = not isinstance(model.get_submodule(parent), (UnfusedExperts, IdLoraLayer))
                if not foreign:
                    continue
                name = re.sub(r"(\.base_layer)+$", "", name)  # as it was before another tuner wrapped it
            wanted = [
                parameter
                for parameter, count in fused_parameters(module).items()
                if self._targets_experts(peft_config, name, parameter, count)
            ]
            if wanted and not foreign and can_unfuse(module):
                setattr(model.get_submodule(parent), child, UnfusedExperts(module))
            else:
                note = " (already adapted by another tuner)" if foreign else ""
                unsupported += [f"{name}.{p} {list(module.get_parameter(p).shape)}{note}" for p in wanted]
        if unsupported:
            raise ValueError(
                "target_modules takes in parameters that look like fused linear layers, of a kind ID-LoRA cannot open: "
                + ", ".join(brief(unsupported))
                + ". To leave them frozen, name their modules in exclude_modules, or other layers in target_modules."
            )
        targeting.include_quantised_linears(peft_config, model, is_linear)

    def _targets_experts(self, config: PeftConfig, module: str, parameter: str, count: int) -> bool:
        def asks(name: str) -> list[Any]:
            return [self._check_target_module_exists(config, f"{module}.{expert}.{name}") for expert in range(count)]

        whole, each = self._check_target_module_exists(config, module), asks(parameter)
        if isinstance(whole, ExcludedModule) or all(isinstance(found, ExcludedModule) for found in each):
            return False
        if whole or any(each) or str(config.target_modules).lower() == "all-linear":
            return True
        if parts := [part for part in FUSED_FROM.get(parameter, ()) if any(asks(part))]:
            raise ValueError(
                f"target_modules names {', '.join(parts)}, which {module!r} holds fused as {parameter}: name that too, "
                f"or leave the experts frozen with exclude_modules={[module.rpartition('.')[2]]}"
            )
        return False

    def _create_and_replace(
        self,
        peft_config: IdLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        reason = unsupported(target, parent, peft_config.dropout)
        if names := [name for name in self._names.get(id(target), []) if name != current_key.removeprefix(_COMPILED)]:
            reason = reason or f"the same module is also {', '.join(names)}, and would be adapted under one name only"
        if reason:
            self._unsupported.setdefault(f" ({reason})", []).append(current_key)
            return
        base = target.get_base_layer() if isinstance(target, IdLoraLayer) else target
        _, d = linear_shape(base)
        s = peft_config.rank_boost
        k, wanted = peft_config.sizes(current_key)
        r = fit_rank(d, k, wanted, s)
        if r == 0:
            reason = f"d = {d} cannot hold k = {k} clusters of a rank that is a multiple of s = {s}"
            self._unsupported.setdefault(f" ({reason})", []).append(current_key)
            return
        if r < wanted:
            size = f"d = {d}" if k == peft_config.num_clusters else f"d = {d}, k = {k}"
            self._shrunk.setdefault(f" ({size}: r = {r} instead of {wanted})", []).append(current_key)
        if isinstance(target, IdLoraLayer):
            target.update_layer(adapter_name, peft_config, k, wanted)
            layer = target
        else:
            layer = Linear(target, adapter_name, peft_config, k, wanted, get_quantization_kwargs(self.model))
            layer.name = current_key
            self._replace_module(parent, target_name, layer, target)
        self._new.append((current_key, layer))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would move the new layer, whose tensors are where they belong already, or still on the meta device.
        setattr(parent, child_name, new_module)

    def _report(self, config: IdLoraConfig, adapter_name: str) -> None:
        if self._unsupported:
            raise ValueError(
                "ID-LoRA adapts linear layers: nn.Linear, Conv1D and quantised ones. These targets cannot be adapted: "
                + ", ".join(name + reason for reason, keys in self._unsupported.items() for name in brief(keys))
                + ". Leave them out with exclude_modules, or choose others with target_modules."
            )
        if not self._shrunk or config.index_stored:
            return
        count = sum(map(len, self._shrunk.values()))
        names = ", ".join(name + fit for fit, keys in self._shrunk.items() for name in brief(keys))
        message = f"{count} of {len(self._new)} layers are too narrow for k * r rows with k = {config.num_clusters}"
        if config.rank_fit == "error":
            raise ValueError(f'{message}: {names}. Lower r or num_clusters, or their patterns, or rank_fit="shrink".')
        warnings.warn(f"{message}; they get the largest rank that fits: {names}", stacklevel=2)

    def _choose_rows(self, config: IdLoraConfig, adapter_name: str) -> None:
        several = sharding.world_size() > 1
        layers = [(name, layer) for name, layer in self._new if several or not stored(layer.get_base_layer()).is_meta]
        bar = tqdm(layers, desc="Choosing rows", unit="layer", disable=None if self._progress else True)

        def choose(name: str, layer: IdLoraLayer, weight: Tensor | None = None) -> None:
            bar.set_postfix_str(name, refresh=False)
            try:
                layer.choose_rows(adapter_name, config, name, weight)
            except (ValueError, TypeError) as error:
                raise type(error)(f"layer {name!r}: {error}. To leave the layer out, use exclude_modules.") from error
            bar.update()

        with bar:
            if several:
                choosing.choose_rows(layers, adapter_name, choose)
            else:
                for name, layer in layers:
                    choose(name, layer)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if found and peft_config.layers_to_transform is not None and key in peft_config.target_modules:
            # PEFT ignores layers_to_transform for targets given by their full name, as "all-linear" resolves to:
            # ask again by the last part of the name.
            suffix = dataclasses.replace(peft_config, target_modules={key.rpartition(".")[2]})
            return check_target_module_exists(suffix, key)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hooks.note_padding(self.model, args, kwargs)
        return super().forward(*args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around ``forward`` and ``generate`` with their arguments: here for ``adapter_names``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with adapter_names(self.model, names, num_beams=mixed_batches.repeated_rows(kwargs)) as batch:
            batch.check_inputs(args, kwargs)  # generate may run an encoder first
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        refusals.check(self.model, adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            refusals.check(self.model, adapter_names, safe_merge)
        else:  # the original base model, as PEFT promises
            self.unmerge_adapter()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        take_hooks_off(model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "ID-LoRA has no add_weighted_adapter: adapters have rows and a router of their own, and the sum of two has "
            "no such form. Activate both, which sums them: model.base_model.set_adapter([name, other]); "
            "their weights are set_scale(name, weight) on every layer."
        )

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """PEFT's hook for what is saved: whole tensors, also of a model that is sharded (then all ranks must call)."""
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: sharding.full(tensor) for name, tensor in tensors.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's hook for names in the file: the layer's own, also where another tuner has wrapped it since."""
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return name.replace(".base_layer.idlora_", ".idlora_")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook between reading a file and filling a model: here everything is checked, or undone."""
        tuner = getattr(model, "base_model", None)
        before = tuner._before.get(adapter_name) if isinstance(tuner, IdLoraModel) else None
        try:
            verify(model, config, adapter_name, state_dict)
        except BaseException:
            if before is not None:
                before.restore()
            raise
        if isinstance(tuner, IdLoraModel):
            tuner._before.pop(adapter_name, None)
            forget_transformers_load(tuner.model)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


if "IDLORA" not in peft_internals.registered_methods():
    register_peft_method(name="idlora", config_cls=IdLoraConfig, model_cls=IdLoraModel)
