"""What operations are for, by the names that profilers give them, and the arithmetic of overlapping times."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.report.op_kinds import (
    ATTENTION,
    CASTS,
    COMMUNICATION,
    ELEMENTWISE,
    GEMM,
    HOST,
    MOVING,
    OPTIMIZER,
    kind_of_kernel,
    kind_of_operator,
    length,
    overlap,
    union,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNN", GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", GEMM),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)", GEMM),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>(Flash_fwd_params)", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", ATTENTION),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", COMMUNICATION),
        ("void multi_tensor_apply_kernel<TensorListMetadata<5>, AdamFunctorMaster<float>>(long)", OPTIMIZER),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>()", OPTIMIZER),
        ("void transformer_engine::cast_transpose_fused_kernel_notaligned<float>()", CASTS),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>()", ELEMENTWISE),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits>()", ELEMENTWISE),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16, long>()", MOVING),
        ("Memcpy DtoH (Device -> Pageable)", MOVING),
    ],
)
def test_kernels(name: str, kind: str) -> None:
    """A flash kernel counted as a matrix product (its name has wgmma in it), an Adam kernel as elementwise."""
    assert kind_of_kernel(name) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", GEMM),
        ("aten::addmm", GEMM),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::_fused_adamw_", OPTIMIZER),
        ("aten::mul", ELEMENTWISE),
        ("aten::max", ELEMENTWISE),
        ("aten::copy_", MOVING),
        ("aten::index_select", MOVING),
        ("c10d::allreduce_", COMMUNICATION),
        ("gloo:all_reduce", COMMUNICATION),
        ("MulBackward0", HOST),
        ("autograd::engine::evaluate_function: MmBackward0", HOST),
    ],
)
def test_operators(name: str, kind: str) -> None:
    """`aten::masked_fill` and the like all fell under the pattern for `aten::m`."""
    assert kind_of_operator(name) == kind


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


@given(SPANS, SPANS)
def test_lengths_are_those_of_the_moments(first: list, second: list) -> None:
    """Spans that touch, lie in one another or are empty; against a list of all moments."""
    one, two = ({t for start, end in spans for t in range(start, end)} for spans in (first, second))
    assert length(union(first)) == len(one)
    assert overlap(union(first), union(second)) == len(one & two)
    joined = union(first)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(joined))
