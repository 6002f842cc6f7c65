"""Two processes against one: choosing rows, DDP, FSDP2, tensor parallelism. ``distributed_worker.py`` is what they run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import idlora_ext
from idlora_ext.base import sharding
from tests.helpers.commands import environment
from tests.helpers.models import FIELDS, logits, state_of, tiny_llama
from tests.tuner import distributed_worker

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """``records(name)``: what the scenario returned in one process, and on each of two ranks."""
    directory = tmp_path_factory.mktemp("distributed")
    threads = torch.get_num_threads()
    distributed_worker.main(directory, [])
    torch.set_num_threads(threads)
    run_on_two_ranks(directory)

    return lambda name: [read(directory, name, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2))]


def run_on_two_ranks(directory, *names, **variables):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, distributed_worker.__file__, str(directory), *names]
    given = environment(OMP_NUM_THREADS="1", **variables)
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def read(directory, name, rank, world):
    record = torch.load(directory / f"{name}.{rank}of{world}", weights_only=False)
    assert "error" not in record, record["error"]
    return record


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        scale = tensor.abs().max()  # gradients of routers are small, and rounding is of the size of what was added up
        torch.testing.assert_close(ours[name] / scale, tensor / scale, msg=lambda t, n=name: f"{n}: {t}", **tolerance)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_each_layer_is_clustered_on_one_rank_and_all_have_the_same_rows(records):
    one, *two = records("chosen_once")
    assert one["clustered"] == one["layers"]
    first, second = (set(record["clustered"]) for record in two)
    assert not first & second
    assert first | second == set(one["layers"])
    assert len(first) == len(second) == 7
    for record in two:
        assert_equal(record["adapter"], one["adapter"])


def test_an_error_on_one_rank_is_raised_on_all_and_nothing_is_changed(records):
    _, *two = records("error_on_one_rank")
    for where, reason in (("weight", "v_proj': constrained_kmeans: W must be finite"), ("target", "d = 1 cannot hold")):
        assert all(reason in record[where] for record in two)
        assert two[0][where].startswith("rank 1 could not choose rows, so no rank has the adapter: ")
        assert all(record[f"{where} unchanged"] for record in two)


def test_ranks_with_other_layers_choose_their_own(records):
    one, *two = records("different_layers")
    assert not torch.equal(*(one[stage]["model.layers.0.mlp.up_proj.idlora_adapter.default.index"] for stage in (0, 1)))
    for rank, record in enumerate(two):
        assert_equal(record[rank], one[rank])


def test_ranks_without_weights_receive_the_rows(records):
    one, *two = records("weights_on_rank_0_only")
    for record in two:
        assert_equal(record, one)


@pytest.mark.parametrize("kind", ["ddp", "ddp_centred", "fsdp2"])
def test_training_on_two_ranks_is_training_on_one(records, kind):
    one, *two = records(kind)
    for record in two:
        assert record["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert_same(record["gradients"], one["gradients"], rtol=0, atol=1e-5)  # the loss is computed in float32
        assert_same(record["adapter"], one["adapter"], rtol=0, atol=1e-6)
        assert_equal(record["adapter"], two[0]["adapter"])


def test_the_mean_is_over_the_tokens_of_all_ranks(records):
    one, *two = records("ddp_first_batch")
    means = {name: tensor for name, tensor in one["adapter"].items() if name.endswith(".mean")}
    assert len(means) == 14
    assert all(mean.any() for mean in means.values())
    for record in two:
        for name, mean in means.items():
            torch.testing.assert_close(record["adapter"][name], mean, rtol=0, atol=1e-12)
        assert "not all ranks call this layer" in record["different layers"]
    assert "different layers" not in one


def test_fsdp2_saves_whole_tensors_and_loads_into_the_sharded_model(records):
    one, *two = records("fsdp2")
    for record in two:
        assert record["sharded"]
        assert record["types"] == one["types"]  # plain tensors reach the operators
        assert record["state is whole"]
        assert record["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert_equal(record["adapter reloaded"], record["adapter"])
        assert torch.equal(record["reloaded"], record["logits"])
        torch.testing.assert_close(record["logits"], one["logits"], rtol=1e-5, atol=1e-6)
        assert "Not a directory" in record["save error"]
        assert "already sharded by FSDP: add the adapter first" in record["late"]
        assert record["late unchanged"]


@pytest.mark.parametrize("name", [n for n in distributed_worker.SCENARIOS if n.startswith("trainer_")])
def test_trainer_on_two_ranks(records, name):
    one, *two = records(name)
    for record in two:
        assert ("FSDPModule" if "fsdp2" in name else "DistributedDataParallel") in record["wrapped"]
        assert record["sharded"] == ("fsdp2" in name)
        assert record["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert record["resumed"] == record["losses"]
        torch.testing.assert_close(record["logits"], one["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(one["logits"], logits(tiny_llama()))


@pytest.mark.parametrize(
    "name", [f"tensor_parallel{variant}" for variant in ("", "_routers", "_static", "_bounded", "_centred")]
)
def test_tensor_parallel_is_exact(records, name):
    one, *two = records(name)
    for record in two:
        assert record["sharded"] == 15  # 7 layers in each of 2 blocks, and the head
        assert record["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert_same(record["gradients"], one["gradients"], rtol=0, atol=1e-10)
        assert_same(record["adapter"], one["adapter"], rtol=0, atol=1e-12)
        for key in ("gradients", "adapter"):
            assert_equal(record[key], two[0][key])  # replicas stay replicas, bit for bit
        for key in ("logits", "alpha", "two adapters", "trained", "loaded"):
            torch.testing.assert_close(record[key], one[key], rtol=0, atol=1e-12)
        for key in ("tp2 loaded without", "tp2-pretrained loaded without"):  # rows are numbered over all ranks
            torch.testing.assert_close(record[key], one["trained"], rtol=0, atol=1e-12)
    assert (one["trained"] - one["logits"]).abs().max() > 1e-5


def test_tensor_parallel_refuses_dropout(records):
    for record in records("tensor_parallel")[1:]:
        assert "tensor-parallel: dropout would differ between ranks and must be 0" in record["dropout"]
        assert record["dropout unchanged"]


# ---- DeepSpeed ZeRO-3: weights of shape [0] until they are gathered ----------------------------------------------------


def partition(model):
    """A stand-in for what ``deepspeed.zero.Init`` makes of parameters."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.whole = parameter.shape, parameter.data
        parameter.data = parameter.data.new_empty(0)
    return model


@pytest.fixture
def deepspeed(monkeypatch):
    """A stand-in for the package: gathers, and empties again."""
    import contextlib
    import types

    gathered = []

    @contextlib.contextmanager
    def GatheredParameters(parameters, modifier_rank=0):
        parameters = list(parameters)
        gathered.extend(parameters)
        for parameter in parameters:
            parameter.data = parameter.whole
        yield
        for parameter in parameters:
            parameter.data.fill_(torch.nan) if modifier_rank is not None else None
            parameter.data = parameter.data.new_empty(0)

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return gathered


def test_partitioned_weights_are_gathered_to_choose_and_to_save(deepspeed, tmp_path):
    whole = idlora_ext.apply(tiny_llama(), progress=False, **FIELDS)
    model = partition(tiny_llama())
    idlora_ext.apply(model, progress=False, **FIELDS)
    assert deepspeed
    assert all(p.numel() == 0 for name, p in model.named_parameters() if ".idlora_" not in name)
    for name, tensor in whole.state_dict().items():
        if ".idlora_" in name:
            assert torch.equal(model.state_dict()[name], tensor), name

    for name, parameter in model.named_parameters():  # as deepspeed.initialize does
        if ".idlora_" in name:
            parameter.ds_shape, parameter.whole = parameter.shape, parameter.data
            parameter.data = parameter.data.new_empty(0)
    distributed_save(model, tmp_path)
    loaded = idlora_ext.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(whole.eval()))


def distributed_save(model, directory):
    """ZeRO-3 runs in a process group, also with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        idlora_ext.save(model, directory)
    finally:
        dist.destroy_process_group()


def test_deepspeed_zero_3(records, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    run_on_two_ranks(tmp_path, "zero3", DS_ACCELERATOR="cpu")
    one = records("fsdp2")[0]
    for rank in (0, 1):
        record = read(tmp_path, "zero3", rank, 2)
        assert record["partitioned"]
        assert record["adapter partitioned"]
        assert record["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert_same(
            record["adapter"],
            {n: t.to(record["adapter"][n].dtype) for n, t in one["adapter"].items()},
            rtol=0,
            atol=1e-5,
        )


def test_an_empty_weight_is_never_clustered():
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.new_empty(0)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj \(its weight has shape \[0\]: partitioned"):
        idlora_ext.apply(model, progress=False, **FIELDS)
    assert state_of(model) == before


def test_rows_out_of_order_are_refused():
    """``packed_colwise``: what one rank has of fused weights is not one run of rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        layer = torch.nn.Linear(8, 8)
        layer.weight = torch.nn.Parameter(
            distribute_tensor(layer.weight.data, mesh, [_StridedShard(0, split_factor=2)])
        )
        assert "out of order" in sharding.unsupported(layer, 0.0)
    finally:
        dist.destroy_process_group()
