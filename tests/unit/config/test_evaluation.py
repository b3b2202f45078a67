"""Settings of the evaluation: what is refused."""

from typing import Any

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmarks": ["human_eval"]}, "did you mean 'humaneval'"),
        ({"benchmarks": ["mbpp", "mbpp"]}, "name each once"),
        ({"data": {"humanevla": "x"}}, "evaluation.data has 'humanevla'"),
        ({"benchmarks": ["codeforces"], "mode": "parity"}, "no reference evaluator"),
        ({"samples": 2}, "greedy answers are all the same"),
        ({"samples": 0}, "at least 1"),
        ({"top_p": 0.0}, "share of probability"),
        ({"pass_k": [0]}, "numbers from 1 on"),
        ({"mode": "lenient"}, "mode"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """A misspelt benchmark was left out without a word."""
    with pytest.raises(UserError) as caught:
        config_from_dict({"evaluation": settings})
    assert message in str(caught.value)
