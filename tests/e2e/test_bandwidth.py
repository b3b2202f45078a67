"""The all-reduce before a start: passes above the floor, fails below it."""


def test_floor(server):
    """A network at a tenth of its speed was found after days, by the bill."""
    measured = "ra3_megatron.stages.bandwidth:measure"
    assert server.call(measured, {"floor": 1e-6}, world=2) == [0, 0]
    assert server.call(measured, {"floor": 1e6}, world=2) == [1, 1]
    assert server.call(measured, {"floor": 1e6}, world=1) == [0], "a process alone has nobody to wait for"
