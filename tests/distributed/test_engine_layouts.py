"""Loss and every gradient must not depend on how a batch is split over micro-batches and processes."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.distributed.launch import run_ranks

TOLERANCE = 1e-5
ONE = [{"name": "one"}]
SPLITS = [
    {"name": "micro2", "micro_batch_size": 2},
    {"name": "micro8", "micro_batch_size": 8},
    {"name": "recompute", "recompute": "full"},
]
TWO = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2-sp", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "vpp2", "pipeline": 2, "virtual_pipeline": 2},
    {"name": "cp2", "context": 2, "micro_batch_size": 2},
    {"name": "dp2"},
    {"name": "dp2-overlap", "overlap_grad_reduce": True, "overlap_param_gather": True, "micro_batch_size": 2},
]
FOUR = [
    {"name": "tp2-pp2", "tensor": 2, "pipeline": 2, "sequence": True},
    {"name": "tp2-cp2", "tensor": 2, "context": 2, "sequence": True},
    {"name": "pp2-dp2", "pipeline": 2, "micro_batch_size": 2},
    {"name": "cp2-dp2", "context": 2},
]


EXPERTS_TWO = [
    {"name": "ep2", "expert": 2},
    {"name": "ep2-overlap", "expert": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "tp2", "tensor": 2, "sequence": True},
    # Experts whole on one of the two processes that share all other matrices; and whole on both.
    {"name": "tp2-ep2", "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1},
    {"name": "tp2-whole", "tensor": 2, "sequence": True, "expert_tensor": 1},
    {"name": "dp2", "micro_batch_size": 2},
]
EXPERTS_FOUR = [
    {"name": "ep2-dp2", "expert": 2},
    {"name": "tp2-ep2-dp2", "tensor": 2, "sequence": True, "expert": 2},
    {"name": "pp2-ep2", "pipeline": 2, "expert": 2, "micro_batch_size": 2},
    {"name": "cp2-ep4", "context": 2, "expert": 4},
]
LAYOUTS = {
    # The output layer of an untied model has a weight of its own: only where the layers are split is that another path.
    "tied": {1: ONE + SPLITS, 2: TWO, 4: FOUR},
    "untied": {1: ONE, 2: TWO},
    "experts": {1: ONE + SPLITS[1:], 2: EXPERTS_TWO, 4: EXPERTS_FOUR},
}
"""By kind of model and number of processes."""


def full_tensors(folder):
    """Every tensor of a distributed checkpoint, whole, without process groups."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries if hasattr(v, "size")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Folder, and results of every rank by kind and name; all kinds share the start of the processes."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {kind: {} for kind in LAYOUTS}
    for world in (1, 2, 4):
        layouts = [{"kind": kind, **x} for kind, worlds in LAYOUTS.items() for x in worlds.get(world, [])]
        args = {"layouts": layouts, "folder": str(folder)}
        ranks = run_ranks("tests.distributed.engine_worker:run", world, args, 400, folder)
        for layout, *values in zip(layouts, *ranks, strict=True):
            results[layout["kind"]][layout["name"]] = values
    return folder, results


@pytest.fixture(params=LAYOUTS)
def runs(request, everything):
    folder, results = everything
    return folder, request.param, results[request.param]


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def test_loss_and_components_agree_on_every_rank(runs):
    """Local means and a shard's own token count change the loss with DP, CP, split (Megatron-LM#7452, verl#5867)."""
    _, _, results = runs
    (one,) = results["one"]
    assert one["weights"]["cross_entropy"] > 0
    assert 0 < one["monitors"]["clipped"] < one["weights"]["policy_gradient"]
    assert one["monitors"]["rollout_gap"] > 0.1
    assert abs(one["components"]["label_gradient"]) > 1e-3
    for name, ranks in results.items():
        for rank in ranks:
            assert rank["weights"] == one["weights"], name
            for what in ("evaluated", "loss", "grad_norm"):
                assert rank[what] == pytest.approx(one[what], rel=TOLERANCE), (name, what)
            for component, value in one["components"].items():
                assert rank["components"][component] == pytest.approx(value, rel=TOLERANCE), (name, component)
            assert rank["monitors"] == pytest.approx(one["monitors"], rel=TOLERANCE), name


def test_labels_score_alike(runs):
    """Rows of another shard or micro-batch, a stage without the answer, another temperature than the trainer's."""
    _, _, results = runs
    expected = results["one"][0]["scores"]
    assert len(expected) == 8
    for name, ranks in results.items():
        assert set().union(*(rank["scores"] for rank in ranks)) == set(expected), name
        for rank in ranks:
            for window, values in rank["scores"].items():
                assert values == pytest.approx(expected[window], abs=1e-5), name


def test_every_gradient_agrees(runs):
    """Same, for each parameter's gradient: TP, PP, VPP, CP, DP, SP, overlap, recompute, micro-batch splits."""
    _compare(runs, "grads", TOLERANCE)


def test_weights_after_two_updates_agree(runs):
    """A gradient that is right and an update that is wrong (stale parameters, lost master weights) shows here."""
    _compare(runs, "weights", TOLERANCE)
    _, _, results = runs
    for name, ranks in results.items():
        assert ranks[0]["second"] == pytest.approx(results["one"][0]["second"], rel=TOLERANCE), name


def _compare(runs, what, tolerance):
    folder, kind, results = runs
    reference = full_tensors(folder / f"{what}-one-{kind}")
    tensors = {k: v for k, v in reference.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    assert len(tensors) >= 9
    for name in results:
        found = full_tensors(folder / f"{what}-{name}-{kind}")
        for key, expected in tensors.items():
            # Padding of the vocabulary differs with the tensor-parallel size and never gets a gradient.
            rows = min(expected.shape[0], found[key].shape[0])
            difference = relative(found[key][:rows], expected[:rows])
            assert difference <= tolerance, f"{name}: {key} differs by {difference:.2e}"
