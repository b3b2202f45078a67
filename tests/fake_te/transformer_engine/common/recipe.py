"""Names, fields and defaults of the recipes that Megatron-Core makes."""

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    """Number formats; the value is the largest number forward and backward."""

    E4M3 = (448.0, 448.0)
    HYBRID = (448.0, 57344.0)
    E2M1 = (6.0, 6.0)


class Recipe:
    """Base of all recipes."""

    @classmethod
    def delayed(cls) -> bool:
        return issubclass(cls, DelayedScaling)


@dataclass
class DelayedScaling(Recipe):
    """Scales from the largest values of earlier passes."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False

    def __init__(self, **given: object) -> None:
        # The real dataclass drops what it does not know, which Megatron-Core counts on.
        for name in self.__dataclass_fields__:
            setattr(self, name, given.get(name, getattr(type(self), name)))


@dataclass
class Float8CurrentScaling(Recipe):
    """A scale per tensor, from the tensor itself."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """A scale per block of 128."""

    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    """A scale per block of 32."""

    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False


@dataclass
class NVFP4BlockScaling(Recipe):
    """Four bits, a scale per block of 16."""

    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
