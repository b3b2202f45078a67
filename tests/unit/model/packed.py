"""The definition of packed attention, for what runs it on a GPU alone."""

import torch


def slow_packed(q, k, v, queries, keys, most_queries, most_keys, scale):
    """What `model.attention.packed_attention` promises, run by run and head by head."""
    assert queries.dtype == keys.dtype == torch.int32
    out = torch.full_like(q, torch.nan)
    groups, longest = q.size(1) // k.size(1), [0, 0]
    for i in range(len(queries) - 1):
        a, b, c, d = (int(x) for x in (queries[i], queries[i + 1], keys[i], keys[i + 1]))
        longest = [max(longest[0], b - a), max(longest[1], d - c)]
        hidden = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).triu(d - c - (b - a) + 1)
        for head in range(q.size(1)):
            scores = q[a:b, head] @ k[c:d, head // groups].T * (scale or q.size(2) ** -0.5)
            out[a:b, head] = scores.masked_fill(hidden, -torch.inf).softmax(1) @ v[c:d, head // groups]
    assert longest == [most_queries, most_keys]
    return out
