"""The attacks are real: a plain runner, program and tests in one process, pays for them."""

import pytest

from tests.unit.reward.attacks import ALL, Case, Kind, control, expand, new_token, parse
from tests.unit.reward.battery import CHEATS
from tests.unit.reward.canaries import Canaries
from tests.unit.reward.escapes import CONTROL_YES, ESCAPES
from tests.unit.reward.plain import paid_by_plain


def real(attacks: tuple) -> list[Case]:
    """The cases that a plain runner is said to pay."""
    return [case for case in expand(attacks) if case.kind in case.attack.plain]


CHEATED, ESCAPED = real((*CHEATS, CONTROL_YES)), real(ESCAPES)


@pytest.fixture(scope="module")
def paid() -> dict[str, bool]:
    """Whether a plain runner paid each case."""
    with Canaries() as canaries:
        names = {**canaries.names, "token": canaries.token or new_token()}
        cases = [*CHEATED, *ESCAPED]
        return dict(zip([c.name for c in cases], paid_by_plain(c.submission(names) for c in cases), strict=True))


@pytest.mark.parametrize("case", [*CHEATED, *ESCAPED], ids=lambda case: case.name)
def test_plain_runner_pays(case: Case, paid: dict[str, bool]) -> None:
    """An attack that does nothing would be survived by every judge."""
    assert paid[case.name]


@pytest.mark.parametrize("kind", ALL)
def test_plain_runner_tells_right_from_wrong(kind: Kind) -> None:
    """A plain runner that paid everything would prove nothing."""
    wrong = Case(parse(0, "#: wrong\ndef add(a, b): return a * b")[0], "program", kind)
    assert paid_by_plain([control(kind), wrong.submission({})]) == [True, False]


def test_enough_attacks_are_real() -> None:
    """The list of those that a plain runner pays was empty."""
    assert len({case.attack.name for case in CHEATED}) > 35
    assert len({case.attack.name for case in ESCAPED}) > 12
