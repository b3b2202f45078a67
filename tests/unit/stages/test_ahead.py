"""What a checkpoint notes of steps that are drawn ahead."""

import json

from ra3_megatron.stages.ahead import Block, next_block, note, noted


def test_blocks_cover_all_steps() -> None:
    """A last block that went past the end, or steps that nobody drew for."""
    blocks, first = [], 1
    while (block := next_block(first, 3, 8, first - 1)) is not None:
        blocks.append(list(block.steps))
        first = block.last + 1
    assert blocks == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_a_block_is_read_back_unless_its_settings_changed() -> None:
    """Rollouts of other settings or of steps that are gone were waited for; changed ones were drawn anew in silence."""
    said: list[str] = []
    facts = json.loads(json.dumps(note(Block(3, 4, 1), "a")))
    assert noted(facts, "a", 9, said.append) == Block(3, 4, 1)
    assert noted(note(None, "a"), "a", 9, said.append) is None
    assert not said
    assert noted(facts, "b", 9, said.append) is None
    assert noted(facts, "a", 3, said.append) is None
    assert len(said) == 2
    assert "steps 3 to 4" in said[0]
