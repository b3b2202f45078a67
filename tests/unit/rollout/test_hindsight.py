"""Rollouts of a policy that has read the coming lines."""

import numpy as np
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.trajectory import Kind, keeps_program
from ra3_megatron.rollout.hindsight import SEPARATOR, from_hindsight, hindsight_view, hindsight_views, separator_ids
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import SOURCE, OftenThinks, texts_and_tokens

PROMPT = "'''A stack.'''\n"


@pytest.mark.parametrize("start", [True, False])
def test_view(start):
    """The second copy must be the trajectory, token by token, and its decisions the same."""
    trajectories, think_tokens = texts_and_tokens(start)
    tokenizer = think_tokens.tokenizer
    for number, plain in enumerate(trajectories):
        view = hindsight_view(plain, separator_ids(think_tokens))
        head = view.segments[0]
        assert (head.kind, head.start, view.segments[-1].end) == (Kind.PROMPT, 0, len(view.ids))
        assert view.has_start == start
        assert view.ids[0] == plain.ids[0]
        assert not start or plain.ids[0] not in view.ids[1:]
        prompt = PROMPT if start and number == 0 else ""
        text = tokenizer.decode(plain.ids)
        assert tokenizer.decode(view.ids[: head.end]) == text + SEPARATOR + prompt
        assert tokenizer.decode(view.ids[head.end :]) == text.removeprefix(prompt)
        for line in range(plain.num_lines):
            one, two = plain.segment(line), view.segment(line)
            assert plain.ids[one.start : one.end].tolist() == view.ids[two.start : two.end].tolist()
        for one, two in zip(plain.decisions, view.decisions, strict=True):
            assert (one.line, one.forced, one.think_set) == (two.line, two.forced, two.think_set)
            assert plain.ids[one.position] == view.ids[two.position]
            assert view.ids[two.position - len(two.forced) : two.position].tolist() == list(two.forced)


def test_back_to_the_plain_text(make_model, parallel):
    """Actions that point elsewhere after the first copy is gone; lines scored with the answer in view."""
    trajectories, think_tokens = texts_and_tokens()
    arch, chunks = make_model("qwen3", think_tokens.tokenizer.vocab_size)
    views = hindsight_views(trajectories, think_tokens, 500, 6)
    engine = MegatronEngine(chunks, arch, parallel, 8, 500)
    found = rollout(engine, views, 3, OftenThinks(2), RolloutSettings(1.0, 6), think_tokens)
    assert sum(r.thought.sum() for r in found) > 10
    for one in found:
        expert = trajectories[one.number]
        plain = from_hindsight(one, expert)
        assert SOURCE[:20] not in think_tokens.tokenizer.decode(plain.trajectory.ids)[30:]
        assert keeps_program(expert, plain.trajectory, think_tokens.tokenizer, think_tokens.format)
        assert plain.trajectory.ids[plain.positions].tolist() == one.trajectory.ids[one.positions].tolist()
        assert [plain.trajectory.ids[d.position] for d in plain.trajectory.decisions] == [
            one.trajectory.ids[d.position] for d in one.trajectory.decisions
        ]
        assert [d.line for d in plain.trajectory.decisions] == [d.line for d in one.trajectory.decisions]
        assert {k: v.tolist() for k, v in plain.trajectory.thoughts().items()} == {
            k: v.tolist() for k, v in one.trajectory.thoughts().items()
        }
        assert np.isnan(plain.line_log_probs).all()
        assert np.isnan(plain.without_thought).all()
        assert np.isfinite(one.line_log_probs).all(), "the rollout itself is left as it was"
        # q's log-probabilities are those of the view: what trains q reads it, not the plain text.
        scores = full_log_probs(chunks[0], arch.vocab_size, one.trajectory.ids.tolist()).numpy()
        sampled = one.trajectory.kinds()[one.positions] == Kind.THOUGHT
        expected = scores[one.positions[sampled] - 1, one.trajectory.ids[one.positions[sampled]]]
        np.testing.assert_allclose(plain.log_probs[sampled], expected, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="not one of a view"):
        from_hindsight(plain, expert)


def test_room():
    """Twice the text: said with the length that fits, and that length does fit."""
    trajectories, think_tokens = texts_and_tokens()
    length = max(len(t.ids) for t in trajectories)
    with pytest.raises(UserError, match=rf"has {length} tokens.*snippet_tokens to (\d+) or less") as error:
        hindsight_views(trajectories, think_tokens, 2 * length, 6)
    fitting = int(str(error.value).partition("snippet_tokens to ")[2].split()[0])
    bare = [t for t in trajectories if len(t.segments) and t.num_lines and len(t.ids) <= fitting]
    assert bare
    assert hindsight_views(bare, think_tokens, 2 * length, 6)
