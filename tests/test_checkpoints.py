"""Checkpoints of cut models through torch.distributed.checkpoint, torch.save and save_pretrained."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import tpfuse

from .graphs import fake_world
from .policy_harness import Model, build, run_threads
from .ranks import run_processes
from .test_parallelize_families import model_of
from .test_parallelize_models import mesh_of


def make() -> nn.Module:
    """Packed and routed MLPs; two key/value heads, which four ranks share."""
    return Model(True, 2)


def cut(policy: tpfuse.SharingPolicy) -> nn.Module:
    return tpfuse.parallelize(build(make), mesh_of(policy), policy)


def forget(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1)
    return model


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return list(found) == list(want) and all(torch.equal(found[name], want[name]) for name in want)


# -- torch.distributed.checkpoint -------------------------------------------------------------------------------------


def save(rank: int, folder: str) -> list[str]:
    """What is wrong on four ranks, two replicas; saves the model for the others."""
    wrong, want = [], build(make).state_dict()
    model = cut(tpfuse.SharingPolicy(4, 2, None))
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/replicas")
    model = cut(tpfuse.SharingPolicy(4))
    dcp.async_save(model.state_dict(), checkpoint_id=f"{folder}/whole", process_group=dist.new_group()).result()
    for options in (StateDictOptions(full_state_dict=True), StateDictOptions(full_state_dict=True, cpu_offload=True)):
        full = get_model_state_dict(model, options=options)
        if not (same(full, want) or (options.cpu_offload and rank)):
            wrong.append(f"get_model_state_dict({options})")
    forget(model)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/replicas")
    model.load_state_dict(state)
    if not same(tpfuse.full_state_dict(model), want):
        wrong.append("what two replicas saved, loaded into one")
    return wrong


def load(rank: int, folder: str) -> list[str]:
    """What is wrong with loading on two ranks what four have saved."""
    wrong, want = [], build(make).state_dict()
    for name in ("replicas", "whole"):
        model = forget(cut(tpfuse.SharingPolicy(2)))
        state = model.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        model.load_state_dict(state)
        if not same(tpfuse.full_state_dict(model), want):
            wrong.append(name)
    return wrong


def test_a_checkpoint_fits_other_numbers_of_ranks_and_the_uncut_model(tmp_path):
    assert run_processes(4, save, str(tmp_path)) == [[]] * 4
    assert run_processes(2, load, str(tmp_path)) == [[]] * 2
    want = build(make).state_dict()
    for name in ("replicas", "whole"):
        state = forget(build(make)).state_dict()
        dcp.load(state, checkpoint_id=tmp_path / name, no_dist=True)
        assert same(state, want), name


# -- one rank's state dict --------------------------------------------------------------------------------------------


def one_rank(policy: tpfuse.SharingPolicy | None = None) -> nn.Module:
    return cut(policy or tpfuse.SharingPolicy(4))


def test_a_state_dict_loads_back_and_so_does_the_uncut_one():
    with fake_world(4):
        model, want = one_rank(), build(make).state_dict()
        slices = {name: p.detach().clone() for name, p in model.named_parameters()}
        written = io.BytesIO()
        torch.save(model.state_dict(), written)
        written.seek(0)
        averaged = {
            name: tensor.clone().mul_(0.5).add_(tensor, alpha=0.5) for name, tensor in model.state_dict().items()
        }
        for given in (copy.deepcopy(model.state_dict()), torch.load(written), want, slices, averaged):
            forget(model).load_state_dict(given)
            assert all(torch.equal(p, slices[name]) for name, p in model.named_parameters())
            forget(model.layers[1]).load_state_dict({n[9:]: t for n, t in given.items() if n.startswith("layers.1.")})
            assert all(torch.equal(p, slices[name]) for name, p in model.named_parameters())
        assert all(model.state_dict(keep_vars=True)[name] is p for name, p in model.named_parameters())
        assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in want.items()}


def test_another_ranks_slices_are_refused(tmp_path):
    with fake_world(4):
        written = io.BytesIO()
        torch.save(one_rank().state_dict(), written)
        written.seek(0)
        with pytest.raises(CheckpointException, match="one rank's slice, read from a file"):
            dcp.save(torch.load(written), checkpoint_id=tmp_path, no_dist=True)
    with fake_world(4, rank=1):
        model = one_rank()
        written.seek(0)
        with pytest.raises(tpfuse.PlanError, match=r"slice 0 of 4 .* this rank holds slice 1 of 4"):
            model.load_state_dict(torch.load(written))


def test_slices_are_neither_computed_with_nor_written_as_weights(tmp_path):
    from safetensors.torch import save_file

    with fake_world(4):
        model = one_rank()
        name = next(n for n, c in model._tpfuse.cuts.items() if c.size > 1)
        tensor = model.state_dict()[name]
        for use in (
            tensor.sum, tensor.numpy, lambda: tensor @ tensor.T, lambda: torch.zeros(tensor.shape).copy_(tensor),
            lambda: save_file({name: tensor}, tmp_path / "x.safetensors"),
            lambda: build(make).load_state_dict(model.state_dict()),
        ):  # fmt: skip
            with pytest.raises((tpfuse.PlanError, RuntimeError), match=r"full_tensor\(\)|full_state_dict"):
                use()


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_an_optimizers_state_knows_where_it_lies_and_loads_back():
    with fake_world(4):
        model = one_rank()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        state = optimizer.state_dict()
        whole = [list(p.shape) for p in build(make).parameters()]
        assert [list(state["state"][i]["exp_avg"].shape) for i in range(len(whole))] == whole
        again = torch.optim.AdamW(model.parameters())
        again.load_state_dict(state)
        for parameter in model.parameters():
            assert type(again.state[parameter]["exp_avg"]) is Tensor
            assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        again.step()


def test_an_optimizers_state_of_another_shape_is_not_saved_as_if_it_were_everybodys(tmp_path):
    with fake_world(4):
        model = one_rank()
        optimizer = torch.optim.Adafactor(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(tpfuse.PlanError, match=r"Adafactor .* does not work element by element"):
            optimizer.step()
        type(optimizer).step.__wrapped__(optimizer)
        with pytest.raises(CheckpointException, match="belongs to one rank's slice"):
            dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
        torch.optim.Adafactor(model.parameters()).load_state_dict(optimizer.state_dict())


# -- save_pretrained --------------------------------------------------------------------------------------------------


def save_hugging_face(model, policy, folder, rank):
    tpfuse.parallelize(model, mesh_of(policy), policy)
    part = copy.deepcopy(model)
    slices = {name: p.detach() for name, p in model.named_parameters()}
    for refused in (
        lambda: model.save_pretrained(folder), lambda: model.save_pretrained(folder, state_dict=model.state_dict()),
        lambda: model.save_pretrained(folder, True, slices), lambda: model.push_to_hub("nobody/nothing"),
        lambda: model.model.save_pretrained(folder), lambda: part.save_pretrained(folder),
    ):  # fmt: skip
        with pytest.raises(tpfuse.TPFuseError, match=r"state_dict=tpfuse.full_state_dict\(model\)"):
            refused()
    assert part.save_pretrained.__self__ is part
    model.save_pretrained(folder / str(rank), state_dict=tpfuse.full_state_dict(model))


def test_save_pretrained_writes_whole_weights_or_says_what_to_give_it(tmp_path):
    plain = model_of("llama")
    models = [copy.deepcopy(plain) for _ in range(2)]
    run_threads(2, lambda r: save_hugging_face(models[r], tpfuse.SharingPolicy(2), tmp_path, r))
    back = type(plain).from_pretrained(tmp_path / "0", dtype=torch.float64)
    assert same(back.state_dict(), plain.state_dict())
