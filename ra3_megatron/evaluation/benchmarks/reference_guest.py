"""Runs reference solutions on inputs, in a process of its own: questions in, answers out, each after its length.

Started by file, with the standard library alone; `expected` is the other end.
"""

import copy
import importlib.util
import os
import sys
import time
from pathlib import Path


def _codec():
    """`plain`, loaded by file: the package around it is not to be found from here."""
    spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(question: dict, codec) -> bytes:
    """Outputs of the reference for every input, and the processor seconds of each call; or what went wrong."""
    space: dict = {"__name__": "reference"}
    outputs, seconds = [], []
    try:
        exec(compile(question["program"], "reference.py", "exec"), space)
        function = space[question["entry_point"]]
        for arguments in question["inputs"]:
            # A reference may change its arguments, and the next call must not see that.
            own = copy.deepcopy(arguments)
            start = time.process_time()
            output = function(*own)
            seconds.append(time.process_time() - start)
            outputs.append(output is not None if question["presence"] else output)
        return codec.dumps({"outputs": outputs, "seconds": seconds})
    except BaseException as error:  # noqa: BLE001  a reference may fail in any way, and that is the answer
        return codec.dumps({"error": f"{type(error).__name__}: {error}"[:300]})


def main() -> None:
    """Answer until the input ends."""
    codec = _codec()
    # What a reference prints must not get between the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while size := sys.stdin.buffer.read(8):
        question = codec.loads(sys.stdin.buffer.read(int.from_bytes(size, "big")))
        content = answer(question, codec)
        channel.write(len(content).to_bytes(8, "big") + content)
        channel.flush()


if __name__ == "__main__":
    main()
