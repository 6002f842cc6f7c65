"""``IdLoraModel``: PEFT's tuner for ID-LoRA. It finds the layers, replaces them, and has their rows chosen."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import register_peft_method
from torch import Tensor, nn

from ..base import sharding
from ..base.peft_internals import BaseTuner, get_quantization_kwargs, registered_methods
from ..base.weight import linear_shape
from ..layer.config import IdLoraConfig, fit_rank
from ..layer.layer import IdLoraLayer
from ..layer.linear import Linear
from . import choosing, hooks
from .mixed_batches import adapter_names, repeated_rows
from .names import brief, clean
from .refusals import refuse_foreign_layers, refuse_merge_of_model, refuse_name, unsupported
from .restore import ModelState, fuse, remember_trainable
from .targeting import ALL_LINEAR, AllLinear, is_targeted, means_all_linear, open_experts, resolve_all_linear
from .verify import forget_transformers_load, verify, verify_transformers_load


@dataclass
class Injection:
    """What is found out while PEFT walks a model to put one adapter into it."""

    names: dict[int, list[str]]  # all names of every module of the model, by its id
    layers: list[tuple[str, IdLoraLayer]] = field(default_factory=list)  # that have the adapter now
    unsupported: dict[str, list[str]] = field(default_factory=dict)  # reason -> targets
    shrunk: dict[str, list[str]] = field(default_factory=dict)  # the rank that fits -> layers

    @classmethod
    def into(cls, model: nn.Module) -> Injection:
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(clean(name))
        return cls(names)

    def report(self, config: IdLoraConfig) -> None:
        """Refuse targets that cannot be adapted; say which layers have a smaller rank than was asked for."""
        if self.unsupported:
            raise ValueError(
                "ID-LoRA adapts linear layers: nn.Linear, Conv1D and quantised ones. These targets cannot be adapted: "
                + ", ".join(name + reason for reason, keys in self.unsupported.items() for name in brief(keys))
                + ". Leave them out with exclude_modules, or choose others with target_modules."
            )
        if not self.shrunk or config.index_stored:
            return
        count = sum(map(len, self.shrunk.values()))
        names = ", ".join(name + fit for fit, keys in self.shrunk.items() for name in brief(keys))
        message = f"{count} of {len(self.layers)} layers are too narrow for k * r rows with k = {config.num_clusters}"
        if config.rank_fit == "error":
            raise ValueError(f'{message}: {names}. Lower r or num_clusters, or their patterns, or rank_fit="shrink".')
        warnings.warn(f"{message}; they get the largest rank that fits: {names}", stacklevel=2)


class IdLoraModel(BaseTuner):
    """Adapts the targeted linear layers of a model, in place: ``y = y0 + scaling * concat_j(B z^(j))``.

    Made by ``get_peft_model``, ``inject_adapter_in_model``, transformers' ``add_adapter`` and
    :func:`idlora_ext.apply`. Whatever fails on the way, the model is left exactly as it was.

    Args:
        model: any ``nn.Module``.
        peft_config: the adapter's settings. As for LoRA, the model holds the very object it is given (PEFT's task
            models change theirs, and rely on it), and "all-linear" becomes the names of its layers there; another
            adapter that is made with it takes "all-linear" anew.
        adapter_name: its name.
        low_cpu_mem_usage: PEFT's: parameters on the meta device, to be filled from a file.
        state_dict: PEFT's: adapt the layers whose names occur in it.
        progress: show a bar while rows are chosen.

    Raises:
        ValueError: an adapter of that name exists; targets are unsupported or too narrow (all are named); weights that
            give no rows.
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
        refuse_name(model, adapter_name)
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
            refuse_name(model, adapter_name)
            before = ModelState(model)
            before.configs.pop(adapter_name, None)
        config = self.peft_config[adapter_name]
        settings = dict(vars(config))
        if isinstance(config.target_modules, AllLinear):
            config.target_modules = ALL_LINEAR
        all_linear = means_all_linear(config)
        try:
            self._inject(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
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
        if all_linear and not means_all_linear(config):
            config.target_modules = AllLinear(config.target_modules)

    def _inject(
        self, model: nn.Module, config: IdLoraConfig, adapter_name: str, *arguments: bool | dict[str, Tensor] | None
    ) -> None:
        remember_trainable(model)
        found = self._injection = Injection.into(model)  # filled by what PEFT calls back
        try:
            super().inject_adapter(model, adapter_name, *arguments)
            hooks.refuse_adapter_names(model)
            hooks.watch_padding(model)
            fuse(model)  # experts opened in vain: only some layers, or some of the products, were targeted
            self._injection.report(config)
        except Exception as error:
            if not config.index_stored:
                choosing.fail(error)
            raise
        finally:
            del self._injection
        if not config.index_stored:
            choosing.choose_rows(found.layers, adapter_name, config, progress=self._progress)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """PEFT calls this before it resolves "all-linear", to ``nn.Linear`` and ``Conv1D`` only, and lists the modules
        of the model; layers that another tuner has adapted it would not count as linear.
        """
        refuse_foreign_layers(peft_config, model)
        open_experts(peft_config, model)
        resolve_all_linear(peft_config, model)

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
        found = self._injection
        reason = unsupported(target, parent, peft_config.dropout)
        if names := [name for name in found.names.get(id(target), []) if name != clean(current_key)]:
            reason = reason or f"the same module is also {', '.join(names)}, and would be adapted under one name only"
        if reason:
            found.unsupported.setdefault(f" ({reason})", []).append(current_key)
            return
        base = target.get_base_layer() if isinstance(target, IdLoraLayer) else target
        _, d = linear_shape(base)
        s = peft_config.rank_boost
        k, wanted = peft_config.sizes(current_key)
        r = fit_rank(d, k, wanted, s)
        if r == 0:
            reason = f"d = {d} cannot hold k = {k} clusters of a rank that is a multiple of s = {s}"
            found.unsupported.setdefault(f" ({reason})", []).append(current_key)
            return
        if r < wanted:
            size = f"d = {d}" if k == peft_config.num_clusters else f"d = {d}, k = {k}"
            found.shrunk.setdefault(f" ({size}: r = {r} instead of {wanted})", []).append(current_key)
        if isinstance(target, IdLoraLayer):
            target.update_layer(adapter_name, peft_config, k, wanted)
            layer = target
        else:
            layer = Linear(target, adapter_name, peft_config, k, wanted, get_quantization_kwargs(self.model))
            layer.name = current_key
            self._replace_module(parent, target_name, layer, target)
        found.layers.append((current_key, layer))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would move the new layer, whose tensors are where they belong already, or still on the meta device.
        setattr(parent, child_name, new_module)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        return is_targeted(peft_config, key)

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
        with adapter_names(self.model, names, num_beams=repeated_rows(kwargs)) as batch:
            batch.check_inputs(args, kwargs)  # generate may run an encoder first
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        refuse_merge_of_model(self.model, adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            refuse_merge_of_model(self.model, adapter_names, safe_merge)
        else:  # the original base model, as PEFT promises
            self.unmerge_adapter()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        hooks.take_hooks_off(model)
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
        return {name: sharding.full_tensor(tensor) for name, tensor in tensors.items()}

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


if "IDLORA" not in registered_methods():
    register_peft_method(name="idlora", config_cls=IdLoraConfig, model_cls=IdLoraModel)
