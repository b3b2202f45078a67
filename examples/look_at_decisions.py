"""Where a model may think: a snippet as RA3 sees it, line by line, with the tokens that decide.

    python examples/look_at_decisions.py [FILE.py]

Prints every line that starts with a decision, how many tokens of it are forced before the decision, how many vocabulary
entries would open a thought there, and the program with a thought spliced in.
"""

import sys
from pathlib import Path

from ra3_megatron.data.latent import CommentFormat, ThinkTokens
from ra3_megatron.data.tokenizers import train_bpe
from ra3_megatron.data.trajectory import TrajectoryBuilder, keeps_program, splice

SNIPPET = """def mean(values):
    total = sum(
        values
    )
    if not values:
        return None
    return total / len(values)
"""


def main() -> None:
    code = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else SNIPPET
    tokenizer = train_bpe([Path(__file__).read_text(encoding="utf-8") * 4, code], vocab_size=400)
    think_tokens = ThinkTokens(tokenizer, CommentFormat())
    trajectory = TrajectoryBuilder(tokenizer, think_tokens, start_id=tokenizer.bos_id).build(code)
    print(f"{len(trajectory.ids)} tokens, {trajectory.num_lines} lines, {len(trajectory.decisions)} decisions\n")
    for decision in trajectory.decisions:
        segment = trajectory.segment(decision.line)
        text = tokenizer.decode(trajectory.ids[segment.start : segment.end])
        openers = len(think_tokens[decision.think_set].ids)
        print(f"{len(decision.forced)} forced, {openers:3} tokens open a thought | {text.rstrip()}")

    line = trajectory.decisions[-1].line
    segment = trajectory.segment(line)
    text = tokenizer.decode(trajectory.ids[segment.start : segment.end])
    indent = text[: len(text) - len(text.lstrip())]
    infused = splice(trajectory, {line: tokenizer.encode(f"{indent}# the sum was taken above\n")})
    print("\nwith a thought before the last line:\n")
    print(infused.program(tokenizer))
    print("same program:", keeps_program(trajectory, infused, tokenizer, CommentFormat()))


if __name__ == "__main__":
    main()
