"""Over two processes: the estimate of a dry run against the bytes that are there, and the blame for a NaN."""

import pytest

from tests.distributed.launch import run_ranks

SPLITS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}}
LAYOUTS = [
    {"precision": precision, "tied": tied, **split}
    for split in SPLITS.values()
    for precision in ("fp32", "bf16")
    for tied in (True, False)
]
NAMES = [f"{s}-{p}-{'tied' if t else 'untied'}" for s in SPLITS for p in ("fp32", "bf16") for t in (True, False)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks("tests.unit.training.ranks:both", 2, {"layouts": LAYOUTS}, 150, folder)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=NAMES)
def test_estimate_equals_what_is_held(found, number):
    """A dry run that promised a fit, and a run that did not (terms forgotten, shards counted whole)."""
    ranks = [rank["memory"][number] for rank in found]
    for rank in ranks:
        assert rank["parameters"] == rank["parameters_estimated"]
    # Which stage is the fullest depends on activations and logits too.
    fullest = next(r for r in ranks if r["parameters"] == r["fullest"])
    estimated = fullest["estimated"]
    assert fullest["weights"] == estimated["weights"]
    # Buffers are padded so that every replica has an equal, aligned share.
    assert estimated["gradients"] <= fullest["gradients"] <= 1.1 * estimated["gradients"] + 4096
    # Shards end where buffers are cut, not where parameters do: the ranks' shares are equal on average.
    mean = sum(r["optimizer"] for r in ranks if r["parameters"] == fullest["parameters"]) / sum(
        r["parameters"] == fullest["parameters"] for r in ranks
    )
    assert mean == pytest.approx(estimated["optimizer"], rel=0.01)


def test_only_the_rank_with_the_bad_batch_is_blamed(found):
    """After the gradients' reduction every replica has the NaN: rank 0 was blamed for rank 1's data."""
    texts = {rank["blame"] for rank in found}
    assert len(texts) == 1, "all ranks raise the same"
    (text,) = texts
    assert text.startswith("step 5: ")
    assert "rank 1: micro-batch 1 (token ids" in text
    assert "rank 0" not in text
    assert "micro-batch 0" not in text
