"""How many steps' rollouts are drawn at once where they may be older than the weights they train."""

from ra3_megatron.config.errors import UserError


def draw_steps(max_lag: int, draw_ahead: bool) -> int:
    """Steps whose rollouts are drawn at once, with the same weights.

    Drawn for the steps that come next, the last of `max_lag` + 1 steps uses rollouts that are `max_lag` updates old;
    drawn ahead, during as many steps before them, half as many steps do.
    """
    return (max_lag + 1) // 2 if draw_ahead else max_lag + 1


def check_draw_ahead(section: str, max_lag: int, draw_ahead: bool) -> None:
    """Raise UserError where the lag leaves no room for it."""
    if draw_ahead and max_lag % 2 == 0:
        raise UserError(
            f"{section}.draw_ahead is true and {section}.max_lag is {max_lag}; drawn while as many steps are trained, "
            f"what (max_lag + 1) / 2 steps learn from is up to max_lag updates old; set max_lag to {max_lag + 1} or "
            "another odd number"
        )
