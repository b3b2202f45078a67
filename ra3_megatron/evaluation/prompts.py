"""What a model is asked for a task, in the words of the reference evaluators, and the program its answer makes.

Sources: HumanEval's raw prompt and stop words (Chen et al. 2021); EvalPlus 26d6d00 for its two sets; MBPP's three
solved problems with [BEGIN] and [DONE] (Austin et al. 2021), or bigcode-evaluation-harness's docstring; LiveCodeBench
28fef95's form for base models, with an example of our own, and its request for chat models.
"""

from dataclasses import dataclass
from typing import Literal

from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.evaluation.benchmarks.functions import before_function, defined_names, is_python
from ra3_megatron.evaluation.benchmarks.task import Task, TaskSet
from ra3_megatron.evaluation.extraction import Extracted, between_last_fences, extract

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
EVALPLUS_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
EVALPLUS_HUMANEVAL_STOPS = (*EVALPLUS_STOPS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
EVALPLUS_MBPP_STOPS = (*EVALPLUS_STOPS, '\n"""', "\nassert")
BIGCODE_MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
FEW_SHOT_STOPS = ("[DONE]",)
LCB_STOPS = ("###",)
OWN_STOPS = ("\nassert ", '\n"""', "\n```")

_LCB_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
_LCB_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_LCB_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_EXAMPLE_STDIN = (
    "The first line has the number n of readings, the second line n integers. Print the largest difference between a "
    "reading and one that comes before it, or 0 when no reading is larger than an earlier one.",
    "n = int(input())\nreadings = list(map(int, input().split()))\nlowest = readings[0]\nbest = 0\n"
    "for reading in readings:\n    best = max(best, reading - lowest)\n    lowest = min(lowest, reading)\nprint(best)",
)
_EXAMPLE_FUNCTION = (
    "Given a list of words, return how many of them read the same from both ends. An empty word counts.",
    "class Solution:\n    def countMirrored(self, words: List[str]) -> int:\n        ",
    "class Solution:\n    def countMirrored(self, words: List[str]) -> int:\n"
    "        return sum(word == word[::-1] for word in words)",
)


@dataclass(frozen=True)
class Question:
    """What is put to a model, and what its answer is taken for."""

    text: str
    """Text to go on with; in chat form the user's message."""
    system: str = ""
    """System message of the chat form; empty = none."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    answer: Literal["continuation", "alone", "message"] = "continuation"
    """`continuation`: the program is `kept` and the answer; `alone`: the answer; `message`: it is taken out of it."""
    kept: str = ""
    """Beginning of the program that is part of the prompt; with `message` what stands before the entry point."""
    shown: int = 0
    """How many of the task's first tests the text shows."""


def question(task: Task, tasks: TaskSet, settings: EvaluationConfig) -> Question:
    """The question for a task. `tasks` gives the solved examples of few-shot prompts."""
    if settings.prompt == "chat":
        return _chat(task)
    asked = _completion(task, tasks, settings)
    if settings.thoughts == "allowed":
        # A thought is a comment; a reference's stop word would end the answer there.
        return Question(**{**vars(asked), "stop": tuple(s for s in asked.stop if s.strip() != "#")})
    return asked


def _completion(task: Task, tasks: TaskSet, settings: EvaluationConfig) -> Question:
    if task.benchmark == "humaneval":
        text = task.prompt.strip() if settings.humaneval_prompt == "stripped" else task.prompt
        return Question(text, stop=HUMANEVAL_STOPS, kept=text)
    if task.form in ("code", "docstring"):
        text = task.prompt.strip() + "\n"
        stop = EVALPLUS_HUMANEVAL_STOPS if task.form == "code" else EVALPLUS_MBPP_STOPS
        return Question(text, stop=stop, kept=text, shown=min(task.visible, 1) if task.form == "docstring" else 0)
    if task.benchmark == "mbpp":
        return _few_shot(task, tasks) if settings.mbpp_prompt == "few_shot" else _docstring(task, BIGCODE_MBPP_STOPS)
    if task.benchmark in ("livecodebench", "codeforces") or task.entry_point is None:
        return _lcb_base(task)
    return _docstring(task, OWN_STOPS)


def _few_shot(task: Task, tasks: TaskSet) -> Question:
    def solved(one: Task, code: str) -> str:
        tests = "\n".join(one.examples)
        head = "You are an expert Python programmer, and here is your task:"
        return f"{head} {one.prompt} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n{code}"

    parts = [solved(shot, shot.reference.strip() + "\n[DONE]") for shot in tasks.shots]
    text = "\n\n".join([*parts, solved(task, "")])
    return Question(text, stop=FEW_SHOT_STOPS, answer="alone", shown=len(task.examples))


def _docstring(task: Task, stop: tuple[str, ...]) -> Question:
    """A docstring with the problem and one test, as bigcode's harness asks MBPP's; starter code behind it."""
    lines = [task.prompt, *task.examples[:1]]
    text = '"""\n' + "\n".join(lines) + '\n"""\n' + task.starter
    return Question(text, stop=stop, kept=text, shown=len(task.examples[:1]))


def _lcb_base(task: Task) -> Question:
    def part(problem: str, starter: str, answer: str) -> str:
        begin = f"### Starter Code\n{starter}\n\n" if starter else ""
        return f"### Question\n{problem}\n\n{begin}### Answer\n\n{answer}" + ("\n\n" if answer else "")

    if task.starter:
        example = part(*_EXAMPLE_FUNCTION)
    else:
        example = part(_EXAMPLE_STDIN[0], "", _EXAMPLE_STDIN[1])
    return Question(example + part(task.prompt, task.starter, ""), stop=LCB_STOPS, answer="alone", shown=task.visible)


def _chat(task: Task) -> Question:
    if task.form == "code":
        kept = before_function(task.prompt, task.entry_point or "")
        head = "Complete the following Python function. Answer with the whole function in one code block."
        text = f"{head}\n\n```python\n{task.prompt.strip()}\n```\n"
        return Question(text, answer="message", kept=kept)
    if task.entry_point is not None and not task.starter:
        tests = "\n".join(task.examples) or f"(the function is called {task.entry_point})"
        problem = task.prompt.strip().strip('"').strip()
        text = (
            f"{problem}\n\nYour code should pass these tests:\n\n{tests}\n\nAnswer with the code in one code block.\n"
        )
        if task.form == "docstring":
            text = f"{problem}\n\nWrite the function {task.entry_point}. Answer with the code in one code block.\n"
        return Question(text, answer="message", shown=len(task.examples))
    form = (
        f"{_LCB_STARTER}\n```python\n{task.starter}\n```"
        if task.starter
        else f"{_LCB_STDIN}\n```python\n# YOUR CODE HERE\n```"
    )
    end = "### Answer: (use the provided format with backticks)\n\n"
    text = f"### Question:\n{task.prompt}\n\n### Format: {form}\n\n{end}"
    return Question(text, _LCB_SYSTEM, answer="message", shown=task.visible)


def program_of(task: Task, asked: Question, answer: str, parity: bool = False) -> Extracted:
    """The program that an answer makes; `parity` takes LiveCodeBench's own rule where that is what counts."""
    if asked.answer == "continuation":
        program = asked.kept + answer
        notes: tuple[str, ...] = () if answer.strip() else ("no code",)
        if task.entry_point is not None and task.form == "code" and f"def {task.entry_point}(" in answer:
            notes = (*notes, "prompt repeated")
        return Extracted(program, notes)
    if asked.answer == "alone":
        text = answer.strip() + "\n"
        return Extracted(text if text.strip() else "", () if text.strip() else ("no code",))
    if parity and task.benchmark == "livecodebench":
        return Extracted(between_last_fences(answer))
    found = extract(answer, task.entry_point)
    if task.form != "code" or not found.program.strip():
        return found
    if task.entry_point in defined_names(found.program):
        repeated = ("prompt repeated",) if task.prompt.strip() in found.program else ()
        return Extracted(f"{asked.kept}\n{found.program}", (*found.notes, *repeated))
    return Extracted(*_behind_prompt(task, found))


def _behind_prompt(task: Task, found: Extracted) -> tuple[str, tuple[str, ...]]:
    """An answer that is only a function's body, put behind the prompt; indented where it is not."""
    body = found.program
    if not body.startswith((" ", "\t")):
        body = "".join(f"    {line}" if line.strip() else line for line in body.splitlines(keepends=True))
    whole = task.prompt.rstrip() + "\n" + body
    return (whole, found.notes) if is_python(whole) else (found.program, found.notes)
