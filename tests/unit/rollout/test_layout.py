"""Rows in one packed attention call, as on a GPU, against padded ones."""

import numpy as np
import pytest
import torch

from ra3_megatron.rollout.cache import ChunkCache
from ra3_megatron.rollout.engine import Extend
from ra3_megatron.rollout.layout import Upload
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.unit.model.packed import slow_packed
from tests.unit.rollout.conftest import full_log_probs

VOCAB = 101


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_packed_rows(make_model, parallel, family):
    """Keys of another row, of a position too many, or the wrong end of the causal triangle."""
    arch, (chunk,) = model = make_model(family, VOCAB)
    engine = MegatronEngine(model[1], arch, parallel, 4, 120)
    forward = engine._forward
    forward.packs = True
    forward.caches = [ChunkCache(chunk, forward.slots, forward.length, parallel.device, slow_packed)]
    generator = np.random.default_rng(0)
    texts = [generator.integers(VOCAB, size=n).tolist() for n in (1, 40, 7, 20)]
    rows = [engine.open(t) for t in texts]
    # Without a past, with one, and with rows of one token among them.
    for sizes in ((30, 1, 17, 3), (1, 3, 1, 8), (2, 16, 1, 20), (25, 1, 1, 2)):
        news = [generator.integers(VOCAB, size=n).tolist() for n in sizes]
        answers = engine.step([Extend(r, n) for r, n in zip(rows, news, strict=True)])
        for text, new, answer in zip(texts, news, answers, strict=True):
            known = len(text)
            text += new
            expected = full_log_probs(chunk, VOCAB, text)[known - 1 : -1].gather(1, torch.tensor(new).unsqueeze(1))
            np.testing.assert_allclose(answer.log_probs, expected[:, 0].numpy(), rtol=0, atol=1e-5)


def test_upload_keeps_names_shapes_and_fractions():
    """One copy for all numbers: float64s travel as bits, and an empty list is there too."""
    upload = Upload()
    upload.add("a", np.arange(6).reshape(2, 3))
    upload.add("b", [])
    upload.add("c", np.array([0.1, np.nan]))
    upload.add("d", [7])
    sent = upload.send(torch.device("cpu"))
    assert sent["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sent["b"].tolist() == []
    assert sent["c"][0].item() == 0.1
    assert sent["c"][1].isnan()
    assert sent["d"].tolist() == [7]
