"""Rotary embedding with Llama 3's scaling in full and one vectorised application per packed window."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.model.attention import boundaries_of, prefixes_of


class _PackedLength(int):
    """Length of a packed window, with the boundaries of its sequences along."""

    cu_seqlens: torch.Tensor
    boundaries: tuple[int, ...]
    prefixes: tuple[int, ...] | None


class PackedRotaryEmbedding(RotaryEmbedding):
    """Megatron-Core's rotary embedding, with positions that restart at every packed sequence, or go on after the one
    that is its beginning.

    Stock Megatron rotates each packed sequence by itself, in every layer. When the embedding it is given has one row
    per token of the window it rotates all of them at once instead; this class gives it that.
    Megatron fixes Llama 3's three other constants at 1, 4 and 8192; here they come from the architecture.
    """

    def __init__(self, arch: Architecture, use_cpu_initialization: bool, cp_group: Any, fused: bool = False) -> None:
        self._arch = arch
        # Transformer Engine's fused kernel counts positions per sequence itself and wants the plain table.
        self._fused = fused
        super().__init__(
            kv_channels=arch.head_dim,
            rotary_percent=1.0,
            rotary_base=arch.rope_base,
            rope_scaling=arch.rope_scaling is not None,
            rope_scaling_factor=arch.rope_scaling.factor if arch.rope_scaling else 1.0,
            use_cpu_initialization=use_cpu_initialization,
            cp_group=cp_group,
        )
        self._packed: tuple[Any, int, torch.Tensor] | None = None

    def _apply_scaling(self, freqs: torch.Tensor, factor: float = 8, *_constants: Any, **_more: Any) -> torch.Tensor:
        scaling = self._arch.rope_scaling
        assert scaling is not None
        return super()._apply_scaling(
            freqs, factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
        )

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Rows of the embedding: the whole window when it is packed, Megatron's answer otherwise."""
        packed = kwargs.get("packed_seq_params") or next((a for a in args if isinstance(a, PackedSeqParams)), None)
        if self._fused and packed is not None and prefixes_of(packed) is not None:
            raise ValueError("sequences that share a beginning need torch layers; set rlvr.share_prompts=false")
        if self._fused or packed is None or packed.qkv_format != "thd":
            return super().get_rotary_seq_len(*args, **kwargs)
        boundaries = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        known = boundaries_of(packed)
        length = _PackedLength(known[-1])
        length.cu_seqlens, length.boundaries, length.prefixes = boundaries, known, prefixes_of(packed)
        return length

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Angles `[max_seq_len, 1, 1, head_dim]`; for a packed window the positions restart with each sequence."""
        if not isinstance(max_seq_len, _PackedLength):
            return super().forward(max_seq_len, offset, packed_seq, cp_group)
        cu = max_seq_len.cu_seqlens
        if self._packed is None or self._packed[0] is not cu or self._packed[1] != cu._version:
            # Reckoned on the host, which then need not wait for the device.
            ends = torch.tensor(max_seq_len.boundaries)
            lengths = ends.diff()
            before = torch.zeros_like(lengths)
            if max_seq_len.prefixes is not None:
                prefixes = torch.tensor(max_seq_len.prefixes)
                before = torch.where(prefixes >= 0, lengths[prefixes], 0)
            starts = torch.repeat_interleave(ends[:-1] - before, lengths)
            positions = (torch.arange(int(max_seq_len)) - starts).to(cu.device, non_blocking=True)
            longest = int((lengths + before).max())
            self._packed = (cu, cu._version, self.get_emb(longest)[positions])
        return self._packed[2]
