"""What ``test_distributed.py`` runs on every rank: ``torchrun --nproc-per-node 2 distributed_worker.py DIR``.

What each scenario returns is written as ``DIR/NAME.RANKofWORLD``, or the text of its error. With one process the same
scenarios give what two must agree with: in float64, where summing in another order does not show.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import idlora_ext
from idlora_ext import IdLoraConfig
from idlora_ext.layer import adapter as adapter_module
from idlora_ext.layer.layer import IdLoraLayer
from tests.helpers.models import FIELDS, logits, randomize_adapter, state_of, tiny_llama
from tests.tuner.distributed_steps import SIZE, adapted, adapter_of, batch, rank_and_world, train


def chosen_once(directory):
    """Which layers' rows this rank chose, and what it ended with."""
    clustered = []
    original = adapter_module.select_rows
    adapter_module.select_rows = lambda W, *args, **kwargs: (
        clustered.append(W.data_ptr()) or original(W, *args, **kwargs)
    )
    try:
        model = idlora_ext.apply(tiny_llama(), progress=False, **FIELDS)
    finally:
        adapter_module.select_rows = original
    layers = {n: m for n, m in model.named_modules() if isinstance(m, IdLoraLayer)}
    names = [name for name, m in layers.items() if m.get_base_weight().data_ptr() in clustered]
    assert len(names) == len(clustered)
    return {"clustered": names, "adapter": adapter_of(model), "layers": list(layers)}


def error_on_one_rank(directory):
    rank, _ = rank_and_world()
    result = {}
    for where in ("weight", "target"):
        model = tiny_llama()
        if rank == 1 and where == "weight":
            model.model.layers[0].self_attn.v_proj.weight.data[3, 3] = torch.nan
        if rank == 1 and where == "target":
            model.model.layers[1].self_attn.q_proj = nn.Linear(64, 1, bias=False)
        before = state_of(model)
        try:
            idlora_ext.apply(model, progress=False, **FIELDS)
            result[where] = None
        except ValueError as error:
            result[where] = str(error)
        result[f"{where} unchanged"] = state_of(model) == before
    return result


def different_layers(directory):
    """Pipeline stages: the ranks have other layers, here even under one name, and each chooses its own rows."""
    rank, world = rank_and_world()
    result = {}
    for stage in (rank,) if world > 1 else (0, 1):
        model = tiny_llama()
        del model.model.layers[1 - stage]
        result[stage] = adapter_of(idlora_ext.apply(model, progress=False, **FIELDS))
    return result


def weights_on_rank_0_only(directory):
    rank, _ = rank_and_world()
    if rank == 0:
        model = tiny_llama()
    else:
        with torch.device("meta"):
            model = tiny_llama()
    return adapter_of(idlora_ext.apply(model, progress=False, **FIELDS | {"row_scale": True}))


def ddp(directory, **fields):
    model = adapted(**fields)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    return train(model)


def first_batch(directory):
    """Means that the first step of training takes, and what takes none."""
    model = idlora_ext.apply(tiny_llama().double(), progress=False, **FIELDS | {"center": True}).train()
    model(**batch(0))
    result = {"adapter": adapter_of(model)}
    one = nn.Sequential(nn.Linear(16, 16 << rank_and_world()[0]))
    one = idlora_ext.apply(one, progress=False, **FIELDS | {"center": True}, target_modules=["0"]).train()
    try:
        one(torch.ones(2, 16))
    except ValueError as error:
        result["different layers"] = str(error)
    return result


def fsdp2(directory):
    model = adapted()
    seen = set()
    original = adapter_module.ops.adapt
    adapter_module.ops.adapt = lambda *args, **kwargs: seen.update(map(type, args[:4])) or original(*args, **kwargs)
    try:
        if dist.is_initialized():
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
        result = train(model)
    finally:
        adapter_module.ops.adapt = original
    result["types"] = sorted(t.__name__ for t in seen)
    result["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    state = get_peft_model_state_dict(model)
    result["state is whole"] = not any(isinstance(t, DTensor) for t in state.values())
    idlora_ext.save(model, directory / "fsdp2")
    result["files"] = sorted(os.listdir(directory / "fsdp2"))  # there for all ranks when save returns
    with torch.no_grad():
        result["logits"] = model.eval()(**batch(9, mine=False)).logits
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.zero_()
        idlora_ext.load(model, directory / "fsdp2", is_trainable=True)
        result["reloaded"] = model(**batch(9, mine=False)).logits
    result["adapter reloaded"] = adapter_of(model)
    (directory / f"file{rank_and_world()[0]}").write_text("")
    try:
        idlora_ext.save(model, directory / "file0" / "below")
        result["save error"] = None
    except OSError as error:
        result["save error"] = str(error)
    if dist.is_initialized():  # a further adapter would be whole, and its gradients each rank's own
        before = state_of(model)
        try:
            idlora_ext.apply(model, adapter_name="late", progress=False, **FIELDS)
        except ValueError as error:
            result["late"] = str(error)
        result["late unchanged"] = state_of(model) == before
    return result


def tensor_parallel(directory, **fields):
    """Column-parallel: q, k, v, gate and up; row-parallel: o and down; with biases, or with several adapters."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    rank, world = rank_and_world()
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    home = directory / f"base{world}"
    if rank == 0:
        base.save_pretrained(home)
    options = {"attn_implementation": "eager", "dtype": torch.float64}
    without = dict(options)
    if world > 1:
        dist.barrier()
        options["distributed_config"] = DistributedConfig(tp_size=world, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(home, **options)
    result = {}
    if world > 1:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        result["sharded"] = sum(isinstance(w, DTensor) for w in weights)
        before = state_of(model)
        try:
            idlora_ext.apply(model, progress=False, dropout=0.1, **FIELDS)
        except ValueError as error:
            result["dropout"] = str(error)
        result["dropout unchanged"] = state_of(model) == before
    idlora_ext.apply(model, progress=False, **FIELDS | fields)
    if fields.get("center"):
        model.train()(**batch(7, mine=False))
    randomize_adapter(model)
    with torch.no_grad():
        result["logits"] = model.eval()(**batch(9, mine=False)).logits
        first = model.model.layers[0].self_attn.q_proj
        result["alpha"] = first.alpha(
            torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )
    result |= train(model.train(), mine=False)
    model.add_adapter(IdLoraConfig(**FIELDS, seed=5), "second")
    randomize_adapter(model, "second", seed=2)
    model.set_adapter(["default", "second"])
    with torch.no_grad():
        result["two adapters"] = model.eval()(**batch(9, mine=False)).logits
    model.set_adapter("default")
    idlora_ext.save(model, directory / f"tp{world}")
    model.save_pretrained(directory / f"tp{world}-pretrained")
    with torch.no_grad():
        result["trained"] = model(**batch(9, mine=False)).logits
    if world > 1:
        dist.barrier()
    for name in (f"tp{world}", f"tp{world}-pretrained"):
        plain = AutoModelForCausalLM.from_pretrained(home, **without)
        idlora_ext.load(plain, directory / name)
        with torch.no_grad():
            result[f"{name} loaded without"] = plain.eval()(**batch(9, mine=False)).logits
    again = AutoModelForCausalLM.from_pretrained(home, **options)
    idlora_ext.load(again, directory / f"tp{world}")
    with torch.no_grad():
        result["loaded"] = again(**batch(9, mine=False)).logits
    return result


def shard_on_cpu():
    """Accelerate ignores its FSDP plugin when there is no accelerator; nothing in what it does then needs one."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # one state, made again and again
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def trainer(directory, door, fsdp, **fields):
    from transformers import Trainer, TrainingArguments

    rank, world = rank_and_world()
    sizes = {"r": 8, "num_clusters": 2}  # and the defaults, whose mean is taken in the first step

    def make():
        # With cpu_ram_efficient_loading transformers gives the weights to rank 0 alone.
        empty = rank > 0 and fsdp is not None and "cpu_ram_efficient_loading" in fsdp
        with torch.device("meta" if empty else "cpu"):
            model = tiny_llama()
        for module in model.modules():  # in no file, and so not on the meta device
            if type(module).__name__ == "LlamaRotaryEmbedding":
                module.__init__(model.config)
        if door == "apply":
            return idlora_ext.apply(model, progress=False, **sizes)
        return get_peft_model(model, IdLoraConfig(**sizes, **fields))

    sharding = {}
    if fsdp is not None and world > 1:
        shard_on_cpu()
        sharding["fsdp"] = True
        sharding["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT",
            **fsdp,
        }
    rows = [{k: v[0] for k, v in batch(step, mine=False).items()} for step in range(16)]
    name = f"trainer-{door}-{'ddp' if fsdp is None else 'fsdp' + str(len(fsdp))}-{world}"

    def run(steps, resume=None):
        arguments = TrainingArguments(
            output_dir=str(directory / name),
            max_steps=steps,
            per_device_train_batch_size=SIZE // world,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **sharding,
        )
        trainer = Trainer(make(), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    finished, losses = run(4)
    finished.save_model(str(directory / name / "final"))
    result = {"losses": losses, "wrapped": [c.__name__ for c in type(finished.model_wrapped).__mro__]}
    result["sharded"] = all(isinstance(p, DTensor) for p in finished.model_wrapped.parameters())
    if dist.is_initialized():
        dist.barrier()
    result["resumed"] = run(4, str(directory / name / "checkpoint-2"))[1]
    result["files"] = sorted(os.listdir(directory / name / "final"))
    result["logits"] = logits(idlora_ext.load(tiny_llama(), directory / name / "final"))
    return result


def zero3(directory):
    """DeepSpeed's own ZeRO-3, on two ranks."""
    import deepspeed

    deepspeed.comm.torch.build_shm_op = lambda: None  # a minute of compiling, for what gloo does as well
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": SIZE // dist.get_world_size(),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = tiny_llama()
    whole = tiny_llama()
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        for ours, theirs in zip(parameters, whole.parameters(), strict=True):
            ours.data.copy_(theirs.data)
    randomize_adapter(idlora_ext.apply(model, progress=False, **FIELDS))
    result = {"partitioned": all(p.numel() == 0 for n, p in model.named_parameters() if "base_layer" in n)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    result["losses"] = []
    for step in range(3):
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        result["losses"].append(mean.item() / dist.get_world_size())
    result["adapter partitioned"] = all(p.numel() == 0 for n, p in model.named_parameters() if ".idlora_" in n)
    idlora_ext.save(model, directory / "zero3")
    result["adapter"] = adapter_of(idlora_ext.load(whole, directory / "zero3"))
    return result


ON_REQUEST = {"zero3": zero3}
SCENARIOS = {
    "chosen_once": chosen_once,
    "error_on_one_rank": error_on_one_rank,
    "different_layers": different_layers,
    "weights_on_rank_0_only": weights_on_rank_0_only,
    "ddp": ddp,
    "ddp_centred": lambda directory: ddp(directory, router="static", center=True),
    "ddp_first_batch": first_batch,
    "fsdp2": fsdp2,
    "tensor_parallel": tensor_parallel,
    "tensor_parallel_static": lambda directory: tensor_parallel(directory, router="static", shared_router=False),
    "tensor_parallel_routers": lambda directory: tensor_parallel(directory, shared_router=False, rank_boost=4),
    "tensor_parallel_bounded": lambda directory: tensor_parallel(
        directory, router="bounded", row_scale=True, selection="pivoted_qr"
    ),
    "tensor_parallel_centred": lambda directory: tensor_parallel(directory, router="static", center=True, scaling=20.0),
    "trainer_ddp_apply": lambda directory: trainer(directory, "apply", None),
    "trainer_ddp_peft": lambda directory: trainer(directory, "peft", None),
    "trainer_fsdp2_apply": lambda directory: trainer(directory, "apply", {}),
    "trainer_fsdp2_peft": lambda directory: trainer(directory, "peft", {}),
    "trainer_fsdp2_efficient": lambda directory: trainer(
        directory, "peft", {"cpu_ram_efficient_loading": True}, row_scale=True
    ),
}


def main(directory, names):
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = rank_and_world()
    for name in names or SCENARIOS:
        try:
            record = (SCENARIOS | ON_REQUEST)[name](directory)
        except Exception:
            record = {"error": traceback.format_exc()}
        torch.save(record, directory / f"{name}.{rank}of{world}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
