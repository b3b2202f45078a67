"""A group's answers in sequences that hold their prompt once: the same texts, the same loss, the same gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.data.batch import collate, context_parallel_slice
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.model.factory import LayerChoice
from ra3_megatron.rollout.answers import Judged
from ra3_megatron.rollout.completion import Completion, Prompt
from ra3_megatron.rollout.groups import AnswerGroup, answer_batches, answer_sequences
from ra3_megatron.rollout.scoring import score_labels
from ra3_megatron.rollout.windows import Windows, unshared
from ra3_megatron.stages.rlvr_policy import loss_components, shares_prompts
from tests.unit.training import tiny


def made_group(slot: int, prompt: int, lengths: list[int], finish: dict[int, str] | None = None) -> AnswerGroup:
    """Answers of these lengths to one prompt; every second is right."""
    chance = np.random.default_rng([slot, prompt])
    ids = chance.integers(0, tiny.VOCAB, prompt).astype(np.int32)
    answers = [
        Completion(
            Prompt(ids, slot, m),
            chance.integers(0, tiny.VOCAB, n).astype(np.int32),
            log_probs=-chance.random(n),
            finish=(finish or {}).get(m, "stop_id"),
            text_bytes=n,
            temperature=1.0,
            weights_version=0,
        )
        for m, n in enumerate(lengths)
    ]
    verdicts = [Judged("passed" if m % 2 else "wrong", 4 * (m % 2), 4) for m in range(len(lengths))]
    return AnswerGroup.of(slot, slot, slot, answers, verdicts)


def texts(sequence: TrainSequence) -> list[tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]]:
    """Ids, weights and advantages of every text that a sequence holds."""
    starts = sequence.branches or (0,)
    prefix = starts[0]
    spans = list(zip(starts, [*starts[1:], len(sequence.ids)], strict=True))

    def of(values: np.ndarray, span: tuple[int, int]) -> tuple:
        return tuple(np.concatenate((values[:prefix], values[span[0] : span[1]])).tolist())

    weights, advantages = sequence.weights["policy_gradient"], sequence.extras["advantages"]
    return [(of(sequence.ids, s), of(weights, s), of(advantages, s)) for s in spans]


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=2, max_size=9)), max_size=4),
    longest=st.integers(21, 90),
    masked=st.sets(st.integers(0, 8), max_size=3),
    spare=st.integers(0, 2),
)
def test_every_text_is_there_once(groups, longest, masked, spare) -> None:
    """An answer lost, doubled, or cut where a window was full; more windows than without sharing."""
    found = [
        made_group(g, prompt, lengths, dict.fromkeys(masked, "length")) for g, (prompt, lengths) in enumerate(groups)
    ]
    config = RlvrConfig(advantage="centred")
    plain, shared = answer_sequences(found, config), answer_sequences(found, config, share=True)
    wanted = sorted(t for s in plain for t in texts(s))
    assert sorted(t for s in shared for t in texts(s)) == wanted
    assert sorted(t for s in shared for u in unshared(s) for t in texts(u)) == wanted
    assert sum(s.unshared_tokens for s in shared) == sum(len(s.ids) for s in plain)
    windows, without = Windows(shared, longest, 1, 1, 1), Windows(plain, longest, 1, 1, 1)
    length, filled = windows.fill(windows.fewest + spare)
    assert sorted(t for w in filled for s in w for t in texts(s)) == wanted
    assert all(sum(len(s.ids) for s in w) <= length <= longest for w in filled)
    assert len(filled) <= windows.fewest + spare
    assert windows.fewest * windows.length(windows.fewest) <= without.fewest * without.length(without.fewest)


def test_a_prompt_is_held_once() -> None:
    """Sharing that shares nothing: by hand, 7 tokens of prompt and answers of 3, 4 and 5 are 6 + 4 + 5 + 6 tokens."""
    (only,) = answer_sequences([made_group(0, 7, [3, 4, 5])], RlvrConfig(), share=True)
    assert (len(only.ids), only.branches) == (21, (6, 10, 15))
    assert only.ids[6] == only.ids[10] == only.ids[15]
    length, filled = Windows([only], 64, 1, 1, 1).fill(1)
    assert (length, [len(s.ids) for w in filled for s in w]) == (21, [21])
    # Without room for all, the longest first: 6 + 6 and, with the beginning once more, 6 + 5 + 4.
    length, filled = Windows([only], 16, 1, 1, 1).fill(2)
    assert (length, sorted(len(s.ids) for w in filled for s in w)) == (15, [12, 15])


def test_windows_are_full() -> None:
    """Whole groups in windows leave gaps, which cost more than the prompts did."""
    found = [made_group(g, prompt, [65] * 8) for g, prompt in enumerate((56, 46, 40, 28, 30, 17, 19, 16))]
    shared, plain = (answer_sequences(found, RlvrConfig(max_tokens=65), share=s) for s in (True, False))
    needed = sum(len(s.ids) for s in shared)
    windows = Windows(shared, 512, 1, 16, 1)
    assert needed <= windows.fewest * windows.length(windows.fewest) < 1.12 * needed
    assert needed < 0.76 * sum(len(s.ids) for s in plain)


def test_positions_go_on_after_the_beginning() -> None:
    """Branches that start at position 0, or after the branch before them."""
    (only,) = answer_sequences([made_group(0, 4, [2, 3])], RlvrConfig(), share=True)
    batch = collate([[only]], 12, 0)
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 10, 12]
    assert batch.prefixes == (-1, 0, 0, -1)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 1]
    assert batch.max_seqlen == 7
    assert collate([answer_sequences([made_group(0, 4, [2, 3])], RlvrConfig())], 16, 0).prefixes is None
    with pytest.raises(ValueError, match="context parallelism"):
        context_parallel_slice(batch, 0, 2)
    with pytest.raises(ValueError, match="share a beginning"):
        collate([[only]], 12, 0, pad_multiple=4)


def rlvr(**changes) -> RlvrConfig:
    return RlvrConfig(steps=1, tasks="none", max_tokens=9, prompts_per_step=3, group_size=4, lr=1e-2, **changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"aggregation": "constant"}, {"aggregation": "sequence_mean", "overlong": "keep", "kl_coefficient": 0.3}],
    ids=["token mean, masked", "constant", "sequence mean with KL"],
)
def test_loss_and_update_are_the_same(parallel, changes) -> None:
    """Attention to another branch, a beginning's gradient counted once instead of once per answer, rotations off by a
    place: each changes the weights after one update."""
    found = [
        made_group(0, 6, [3, 5, 9, 2], {2: "length"}),
        made_group(1, 1, [4, 4, 2, 1]),
        made_group(2, 9, [1, 7, 3, 8]),
    ]
    config = rlvr(**changes)
    results, after, losses = [], [], []
    for share in (False, True):
        run = tiny.config(train={"seq_length": 32, "global_batch_size": 1}, optimizer={"lr": 1e-2})
        run = RunConfig(**{**vars(run), "rlvr": config})
        engine = tiny.engine(run, parallel, loss_components(run))
        batches = answer_batches(answer_sequences(found, config, share), config, run.train, parallel, 1)
        if config.kl_coefficient:
            for b in batches:
                b.extras["reference_log_probs"] = torch.full(b.labels.shape, -3.0)
        scored = score_labels(engine.chunks, tiny.architecture(), parallel, batches, 1.0)
        counted = [v[b.weights["policy_gradient"] != 0] for v, b in zip(scored, batches, strict=True)]
        losses.append(torch.cat(counted).sort().values)
        results.append(engine.train_step(batches, 1))
        after.append(tiny.state(engine))
        assert share == any(b.prefixes is not None for b in batches)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert results[0].weights == pytest.approx(results[1].weights)
    assert results[0].grad_norm > 1e-3
    for name, values in after[0].items():
        torch.testing.assert_close(values, after[1][name], atol=2e-5, rtol=0, msg=name)


def test_a_text_longer_than_a_window_is_refused() -> None:
    """Half an answer in one window and half in the next."""
    with pytest.raises(UserError, match=r"16 tokens.*hold 15"):
        Windows(answer_sequences([made_group(0, 7, [9, 4])], RlvrConfig(), share=True), 15, 1, 1, 1)


def test_where_it_is_used() -> None:
    """Asked for where the attention cannot branch, and quietly not done."""
    config = config_from_dict({"train": {"steps": 1, "seq_length": 77}})
    torch_layers, te = LayerChoice(False, ""), LayerChoice(True, "")
    assert shares_prompts(config, torch_layers)
    assert not shares_prompts(config, te)
    on = config_from_dict({"train": {"steps": 1}, "rlvr": {"share_prompts": True}})
    with pytest.raises(UserError, match=r"rlvr\.share_prompts"):
        shares_prompts(on, te)
    off = config_from_dict({"train": {"steps": 1}, "rlvr": {"share_prompts": False}})
    assert not shares_prompts(off, torch_layers)
