"""The learning rate by the step, and what a loaded checkpoint may not bring along."""

import itertools
import math

import pytest
import torch

from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.optimizer import apply_settings, build_scheduler
from tests.unit.training import tiny

STEPS, PEAK, LOW = 20, 1.0, 0.1


def rates(schedule, warmup=0, decay_fraction=0.25, min_lr=LOW):
    """Learning rate of steps 1 to STEPS, as the engine advances the scheduler."""
    settings = tiny.config(
        optimizer={
            "lr": PEAK, "min_lr": min_lr, "schedule": schedule, "warmup_steps": warmup,
            "decay_fraction": decay_fraction,
        }
    )  # fmt: skip
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=123.0)
    scheduler = build_scheduler(settings, sgd, STEPS)
    found = []
    for _ in range(STEPS):
        scheduler.step(increment=1)
        found.append(sgd.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "WSD"])
@pytest.mark.parametrize("warmup", [1, 4])
def test_warm_up_begins_at_a_share_of_the_peak(schedule, warmup):
    """Off by one: the first step of a warm-up had learning rate 0 and trained nothing."""
    found = rates(schedule, warmup)
    assert found[:warmup] == pytest.approx([PEAK * (n + 1) / warmup for n in range(warmup)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "WSD"])
@pytest.mark.parametrize("min_lr", [0.0, LOW])
def test_last_step_has_the_lowest_rate(schedule, min_lr):
    """Off by one at the end: the decay was never finished."""
    found = rates(schedule, 3, min_lr=min_lr)
    assert found[-1] == pytest.approx(min_lr, abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found[2:])), "never rises after the warm-up"
    assert found[-2] > min_lr


def test_shapes():
    """Each schedule by its own formula."""
    warmup = 4
    share = [(n - warmup) / (STEPS - warmup) for n in range(1, STEPS + 1)]
    after = slice(warmup, None)
    assert rates("constant", warmup)[after] == [PEAK] * (STEPS - warmup)
    assert rates("linear", warmup)[after] == pytest.approx([PEAK - (PEAK - LOW) * s for s in share[after]])
    cosine = [LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi * s)) for s in share[after]]
    assert rates("cosine", warmup)[after] == pytest.approx(cosine)
    wsd = rates("WSD", warmup, decay_fraction=0.25)
    assert wsd[warmup : STEPS - 5] == [PEAK] * (STEPS - 5 - warmup)
    assert wsd[STEPS - 5 :] == pytest.approx([PEAK - (PEAK - LOW) * n / 5 for n in range(1, 6)])


def test_checkpoint_brings_the_step_and_not_the_shape():
    """Megatron's default takes the checkpoint's length: a run made longer went on at learning rate 0."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    short = build_scheduler(tiny.config(optimizer={"schedule": "linear"}), sgd, 10)
    short.step(increment=10)
    long = build_scheduler(tiny.config(optimizer={"schedule": "linear", "lr": 1.0}), sgd, 20)
    long.load_state_dict(short.state_dict())
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.5)
    long.step(increment=10)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.0)


def test_settings_hold_after_loading(parallel):
    """A checkpoint's parameter groups carry betas, epsilon, decay and rates of the run that wrote it."""
    old = tiny.config(optimizer={"lr": 0.5, "beta1": 0.7, "beta2": 0.8, "eps": 1e-3, "weight_decay": 0.3})
    new = tiny.config(optimizer={"lr": 0.25, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
    e = tiny.engine(old, parallel, [cross_entropy_component()])
    scheduler = build_scheduler(new, e.optimizer, 10)
    apply_settings(new, e.optimizer, scheduler)
    decays = set()
    for group in e.optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 0.25)
        decays.add(group["weight_decay"])
    assert decays == {0.0, 0.1}, "biases and norms have none"


def test_groups_do_not_depend_on_the_rate(parallel):
    """Megatron finds a checkpoint's groups by the rates in them: a changed rate was a KeyError."""
    e = tiny.engine(tiny.config(), parallel, [cross_entropy_component()])
    for group in e.optimizer.param_groups:
        assert "max_lr" not in group
        assert "min_lr" not in group
