"""What every ATen operator does with the indices of its operands: one row of RULES for each operator.

A rule takes the identities, the operands as `Seen` (a tensor's shape and dimensions) and returns the dimensions of its
outputs. An operator without a row protects all that it touches, so that nothing is ever removed on a guess. Add one: write
the rule in the file of its kind, or choose one that is there, and add a row.
"""

from __future__ import annotations

from secateur.structure.rules.call import Rule
from secateur.structure.rules.indices import (
    embedding,
    embedding_bag,
    gather,
    index,
    index_add,
    index_put,
    index_select,
    packed,
    placed,
    sampled,
    scatter,
)
from secateur.structure.rules.norms import (
    batch_norm,
    chained,
    extreme,
    group_norm,
    largest,
    layer_norm,
    reduction,
    spatial,
    transformed,
)
from secateur.structure.rules.pointwise import constant, created, elementwise, filled, unary
from secateur.structure.rules.products import (
    attention,
    columns,
    convolution,
    distances,
    grouped_matmul,
    linear,
    masked_scatter,
    matmul,
    outer,
    trilinear,
    weight_norm,
)
from secateur.structure.rules.views import (
    as_complex,
    as_real,
    as_strided,
    cat,
    channel_shuffle,
    diagonal,
    expand,
    flip,
    gated_halves,
    pad,
    permute,
    pixel_shuffle,
    pixel_unshuffle,
    repeat,
    roll,
    select,
    slice_,
    split,
    squeeze,
    stack,
    transpose,
    unbind,
    unfold,
    unsqueeze,
    view,
)


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rows(view, "view _unsafe_view reshape _reshape_alias view_copy"),
    **_rows(permute, "permute permute_copy"),
    **_rows(transpose, "transpose t transpose_ t_"),
    **_rows(squeeze, "squeeze squeeze_"),
    **_rows(unsqueeze, "unsqueeze unsqueeze_"),
    **_rows(expand, "expand expand_copy"),
    **_rows(repeat, "repeat"),
    **_rows(slice_, "slice"),
    **_rows(select, "select"),
    **_rows(unbind, "unbind"),
    **_rows(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk split_copy"),
    **_rows(cat, "cat concat"),
    **_rows(stack, "stack"),
    **_rows(flip, "flip"),
    **_rows(roll, "roll"),
    **_rows(pad, "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    **_rows(as_strided, "as_strided as_strided_"),
    **_rows(as_complex, "view_as_complex"),
    **_rows(as_real, "view_as_real"),
    **_rows(pixel_shuffle, "pixel_shuffle"),
    **_rows(pixel_unshuffle, "pixel_unshuffle"),
    **_rows(channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_rows(gated_halves, "glu"),
    **_rows(diagonal, "diagonal"),
    **_rows(unfold, "unfold"),
    **_rows(unary, "alias detach detach_ clone contiguous _to_copy to lift_fresh lift view_as dropout tril triu"),
    **_rows(
        unary, "native_dropout resolve_conj resolve_neg _conj fill_ zero_ normal_ uniform_ bernoulli_ exponential_"
    ),
    **_rows(unary, "_assert_async nan_to_num"),
    **_rows(filled, "zeros_like ones_like full_like empty_like rand_like randn_like"),
    **_rows(elementwise, "copy_ copy masked_fill masked_fill_ where lerp addcmul addcdiv rsub bernoulli clamp"),
    **_rows(
        elementwise,
        "floor_divide polar log_sigmoid_forward hardswish hardswish_ _prelu_kernel complex",
    ),
    **_rows(matmul, "mm bmm addmm baddbmm mv addmv dot vdot"),
    **_rows(linear, "linear"),
    **_rows(trilinear, "_trilinear"),
    **_rows(grouped_matmul, "_grouped_mm"),
    **_rows(weight_norm, "_weight_norm_interface"),
    **_rows(columns, "im2col"),
    **_rows(masked_scatter, "masked_scatter"),
    **_rows(outer, "outer ger"),
    **_rows(distances, "_cdist_forward _euclidean_dist"),
    **_rows(convolution, "convolution _convolution"),
    **_rows(attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    **_rows(attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    **_rows(batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    **_rows(batch_norm, "cudnn_batch_norm _batch_norm_no_update _batch_norm_with_update"),
    **_rows(layer_norm, "native_layer_norm _fused_rms_norm"),
    **_rows(group_norm, "native_group_norm"),
    **_rows(reduction, "sum mean var std var_mean std_mean norm linalg_vector_norm"),
    **_rows(largest, "aminmax amax amin max min"),
    **_rows(extreme, "argmax argmin prod any all logsumexp median"),
    **_rows(
        chained,
        "_safe_softmax _softmax _log_softmax softmax cumsum cumprod topk sort kthvalue cummax cummin logcumsumexp",
    ),
    **_rows(spatial, "avg_pool1d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool1d max_pool2d_with_indices"),
    **_rows(spatial, "adaptive_max_pool2d max_pool1d_with_indices avg_pool3d max_pool3d_with_indices"),
    **_rows(
        spatial, "_adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d"
    ),
    **_rows(spatial, "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa"),
    **_rows(spatial, "_upsample_bicubic2d_aa _upsample_nearest_exact2d _upsample_nearest_exact1d max_pool1d"),
    **_rows(transformed, "_fft_r2c _fft_c2r _fft_c2c"),
    **_rows(embedding, "embedding"),
    **_rows(embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    **_rows(sampled, "grid_sampler_2d grid_sampler_3d"),
    **_rows(packed, "_pack_padded_sequence"),
    **_rows(gather, "gather"),
    **_rows(index_select, "index_select"),
    **_rows(index, "index"),
    **_rows(index_put, "index_put index_put_ _unsafe_index_put _index_put_impl_"),
    **_rows(index_add, "index_add index_add_ index_copy index_copy_"),
    **_rows(scatter, "scatter scatter_ scatter_add scatter_add_ scatter_reduce"),
    **_rows(placed, "slice_scatter select_scatter"),
    **_rows(created, "zeros ones full empty new_zeros new_ones new_full new_empty rand randn empty_strided"),
    **_rows(constant, "arange linspace scalar_tensor eye tril_indices triu_indices nonzero bincount histc randperm"),
    **_rows(constant, "_local_scalar_dense item is_nonzero equal randint isin searchsorted bucketize one_hot"),
    **_rows(constant, "unique_consecutive _unique2 _is_all_true _is_any_true affine_grid_generator"),
}
# what runs over indices that go, and has to run over those that are left
REDUCED = frozenset(name for name, rule in RULES.items() if rule in (layer_norm, group_norm, reduction, largest))
