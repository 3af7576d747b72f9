"""Checkpoints: the uncut state comes back, and loading reads only a rank's slices."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from tests.graphs import fake_world
from tests.policy_harness import Model, build, loss_of, run_threads
from tests.test_parallelize_families import model_of
from tests.test_parallelize_models import batches_of, mesh_of, oracle, worst_error
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallel import state_dict as state
from tpfuse.parallel.parallelize import parallelize
from tpfuse.policy import SharingPolicy

FAMILIES = ["deepseek_v3", "glm4_moe", "llama"]


def whole(model, policy):
    parallelize(model, mesh_of(policy), policy)
    return state.full_state_dict(model)


@pytest.mark.parametrize(("dp", "dense"), [(1, 4), (2, 4), (2, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["decorated", "glm4_moe"])
def test_full_state_dict_is_the_uncut_checkpoint(kind, dp, dense):
    plain = build(lambda: Model(True, 2)) if kind == "decorated" else model_of(kind)
    models = [copy.deepcopy(plain) for _ in range(4)]
    policy = SharingPolicy(4, dp, dense)
    want = plain.state_dict()
    for got in run_threads(4, lambda r: whole(models[r], policy)):
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert any(p.shape != want[n].shape for n, p in models[0].state_dict().items())


def load_on_meta(model, policy, path):
    parallelize(model, mesh_of(policy), policy)
    assert all(p.device.type == "meta" for p in model.parameters())
    state.load_full_state_dict(model, path)
    return state.full_state_dict(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_onto_the_meta_device_from_hugging_face_files(family, tmp_path):
    plain = model_of(family)
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.device("meta"):
        models = [type(plain)(plain.config).to(torch.float64) for _ in range(4)]
    want = plain.state_dict()
    for got in run_threads(4, lambda r: load_on_meta(models[r], SharingPolicy(4, 2, 2), tmp_path)):
        assert all(torch.equal(got[name], want[name]) for name in want)


def load_and_train(rank, model, path, batches, want, grads):
    policy = SharingPolicy(4, 2, 2)
    parallelize(model, mesh_of(policy), policy)
    state.load_full_state_dict(model, path)
    logits = model(batches[rank // 2])
    loss_of(logits).backward()
    return worst_error(model, logits, want[rank // 2], grads)


def test_a_loaded_meta_model_still_sums_its_gradients(tmp_path):
    plain = build(Model)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        models = [Model().to(torch.float64) for _ in range(4)]
    batches = batches_of((2, 2))
    want, grads = oracle(plain, batches)
    path = tmp_path / "model.safetensors"
    worst = max(run_threads(4, lambda r: load_and_train(r, models[r], path, batches, want, grads)))
    assert worst[0] < 1e-11, worst


class Recording(dict):
    """A checkpoint that counts the elements that are read of each cut weight."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = {}

    def __getitem__(self, name):
        return _Counted(self, name, super().__getitem__(name))


class _Counted:
    def __init__(self, owner, name, tensor):
        self.owner, self.name, self.tensor, self.shape = owner, name, tensor, tensor.shape

    def narrow(self, *where):
        part = self.tensor.narrow(*where)
        self.owner.read[self.name] = self.owner.read.get(self.name, 0) + part.numel()
        return part


def load_counting(model, checkpoint):
    parallelize(model, mesh_of(SharingPolicy(4)), SharingPolicy(4))
    for name in list(checkpoint):
        if name not in model._tpfuse.cuts:
            checkpoint.pop(name)
    state.load_full_state_dict(model, checkpoint, strict=False)
    return checkpoint.read, {n: p.numel() for n, p in model.named_parameters()}


def test_a_rank_reads_only_its_slices():
    plain = build(Model)
    models = [copy.deepcopy(plain) for _ in range(4)]
    results = run_threads(4, lambda r: load_counting(models[r], Recording(plain.state_dict())))
    for read, held in results:
        assert read and all(held[name] == count for name, count in read.items())


def loads(model, checkpoint):
    parallelize(model, mesh_of(SharingPolicy(2)), SharingPolicy(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError) as refusal:
        state.load_full_state_dict(model, {name: value + 1 for name, value in checkpoint.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("norm.weight"), "missing norm.weight; unexpected nothing"),
        (lambda c: c.update(extra=torch.zeros(1)), "missing nothing; unexpected extra"),
        (lambda c: c.update({"norm.weight": 1}), "has 2 under 'norm.weight'; allowed: a tensor"),
        (lambda c: c.update({"layers.0.mlp.gate_proj.weight": torch.zeros(3, 32)}), "shape [3, 32]"),
        (lambda c: c.update({"norm.weight": torch.zeros(3)}), "norm.weight has shape [3]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(change, words):
    plain = build(Model)
    checkpoint = dict(plain.state_dict())
    change(checkpoint)
    models = [copy.deepcopy(plain) for _ in range(2)]
    for message in run_threads(2, lambda r: loads(models[r], checkpoint)):
        assert words in message


@pytest.mark.parametrize(
    ("source", "words"), [(None, "source=None.: allowed: tensors by name"), ("broken", "is no .safetensors file that")]
)
def test_a_source_that_is_no_checkpoint_is_refused(tmp_path, source, words):
    if source == "broken":
        source = tmp_path / "model.safetensors"
        source.write_bytes(b"no header")
    with fake_world(2):
        model = parallelize(build(Model), mesh_of(SharingPolicy(2)), SharingPolicy(2))
        with pytest.raises(PlanError, match=words):
            state.load_full_state_dict(model, source)


def test_what_was_not_parallelized_is_refused(tmp_path):
    with pytest.raises(PolicyError, match="not parallelized"):
        state.full_state_dict(torch.nn.Linear(1, 1))
    with pytest.raises(PolicyError, match="not parallelized"):
        state.load_full_state_dict(torch.nn.Linear(1, 1), {})
