"""Every touch on the internals of PEFT and transformers that is not part of their documented interface.

The range that is tested is in ``tested_versions.py``. Each import and each function says what it relies on.

:class:`idlora_ext.tuner.model.IdLoraModel` overrides these methods of ``BaseTuner``, which are where it is called from:

==========================================  ===========================================================================
``inject_adapter``                          called once for each adapter, which ``peft_config`` already holds
``_prepare_model``                          called by it before "all-linear" is resolved and the modules are listed
``_create_and_replace``                     called for every targeted module, and for nothing inside an adapted layer
``_check_target_module_exists``             asked for every module; an ``_ExcludedModule`` is one that was excluded
``_replace_module``                         called to put a layer in, and by ``unload`` to put its base layer back
``_enable_peft_forward_hooks``              entered by ``PeftModel`` around ``forward`` and ``generate``, with their
                                            arguments
``_check_merge_allowed``                    called before any layer is merged
``_unload_and_optionally_merge``            all of ``unload`` and ``merge_and_unload``
``_get_adapter_state_dict``                 called for what is saved (since PEFT 0.21)
``_remove_adapter_name_from_key``           gives a tensor's name in the file; loading inverts it (0.21)
``_remap_adapter_state_dict_for_load``      called with a file's tensors before any is copied (0.21)
==========================================  ===========================================================================

:class:`idlora_ext.layer.layer.IdLoraLayer` relies on ``BaseTunerLayer`` treating every dictionary named in
``adapter_layer_names`` and ``other_param_names`` by adapter name: deleting, freezing and moving go through them.
"""

from __future__ import annotations

from peft import PeftType

# The registry that register_peft_method fills, by PeftType.
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

# Like nn.ParameterDict, for buffers: indexing, deleting, `in`, names in the state dict, moving with the module.
from peft.tuners._buffer_dict import BufferDict as BufferDict

# What PEFT's documentation has new methods derive from.
from peft.tuners.tuners_utils import BaseTuner as BaseTuner
from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer

# The false value with which check_target_module_exists tells "excluded" from "not targeted".
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule  # noqa: F401

# Resolves "all-linear" to names, in the configuration itself.
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as maybe_include_all_linear_layers  # noqa: F401

# Which of the adapters to merge, with PEFT's warnings of those that are merged already.
from peft.tuners.tuners_utils import check_adapters_to_merge as check_adapters_to_merge

# PEFT's targeting: names or pattern, exclude_modules, layers_to_transform.
from peft.tuners.tuners_utils import check_target_module_exists as check_target_module_exists

# What modules_to_save puts around a module: `original_module`, `_adapters`, `_active_adapter`, `delete_adapter`.
from peft.utils.other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper

# The first key of a pattern dictionary that a layer's name ends with, else the name itself.
from peft.utils.other import get_pattern_key as get_pattern_key

# Reading (and, for merging, writing) the weights of quantised layers.
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend as ForwardOnlyQuantizationBackend
from peft.utils.quantization_utils import QuantizationBackend as QuantizationBackend
from peft.utils.quantization_utils import get_quantization_kwargs as get_quantization_kwargs
from peft.utils.quantization_utils import resolve_quantization_backend as resolve_quantization_backend


def extend_peft_type() -> None:
    """Add ``PeftType.IDLORA``: PEFT has no door for third-party methods, its registry only accepts enum members.

    Relies on the standard library's Enum keeping its members in ``_member_map_`` and ``_value2member_map_``.
    """
    if "IDLORA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "IDLORA")
    member._name_ = "IDLORA"
    member._value_ = "IDLORA"
    PeftType._member_names_.append("IDLORA")
    PeftType._member_map_["IDLORA"] = member
    PeftType._value2member_map_["IDLORA"] = member
    type.__setattr__(PeftType, "IDLORA", member)


extend_peft_type()


def registered_methods() -> list[str]:
    """Names of the methods PEFT knows: importing a module a second time must not register a method again."""
    return [method.value for method in PEFT_TYPE_TO_TUNER_MAPPING]
