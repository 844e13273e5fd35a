"""Device functions that the Triton kernels share: one program owns one row of logits.

Reading a row once yields m = max z, l = sum e^((z - m) / temperature) and s = sum (z - m) / temperature *
e^((z - m) / temperature); see torch_rows.py for what follows from them. Exponentials are taken to base 2, which
is what the hardware computes. Design, for sm_80 and newer:
- A thread keeps statistics of its own columns, a step of four 16-byte loads at a time, and threads meet once, at the
  row's end: inside the loop nothing crosses lanes, and a new maximum costs a thread one exponential a step. With a
  second one a column the special-function units, not memory, would set the pace.
- Whole steps carry no mask; only the tail does, in blocks of one load a thread.
- The second read runs backwards, because the row's end is what the caches still hold.
- Differences are clamped, not guarded: LOWEST times an exponential of 0 is 0, so a -inf logit contributes 0 and never
  inf - inf; a NaN passes through the clamp, so a broken logit is not mistaken for an improbable one.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EMPTY_MAX = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-1e30)
MAX_LOG_RATIO = tl.constexpr(20.0)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=_ALL)


@triton.jit
def _below(x, row_max):
    """x - max, finite unless x is NaN."""
    return larger(x - row_max, LOWEST)


@triton.jit
def _own(x, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """Columns by load, thread and place in the load (L, THREADS, VECTOR); so they were loaded, and nothing moves."""
    return tl.reshape(x.to(tl.float32), (x.shape[0] // (THREADS * VECTOR), THREADS, VECTOR))


@triton.jit
def _sum_of_own(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _take(own_max, total, moment, x, scale, MOMENT: tl.constexpr):
    """Threads' statistics (THREADS,) with more of their columns; the moment is of undivided logits."""
    new_max = tl.maximum(tl.max(tl.max(x, 2), 0), own_max)
    drop = _below(own_max, new_max)
    factor = tl.exp2(drop * scale)
    if MOMENT:
        d = _below(x, new_max[None, :, None])
        e = tl.exp2(d * scale)
        moment = factor * (moment + drop * total) + _sum_of_own(d * e)
    else:
        e = tl.exp2((x - new_max[None, :, None]) * scale)  # of -inf it is 0 without the clamp
    return new_max, total * factor + _sum_of_own(e), moment


@triton.jit
def row_statistics(row, num_columns, scale, MOMENT: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """(m, l, s) of one row; scale = log2(e) / temperature. m is of z itself, s in natural units, 0 without MOMENT."""
    STEP: tl.constexpr = 4 * BLOCK
    THREADS: tl.constexpr = BLOCK * row.dtype.element_ty.primitive_bitwidth // 128
    columns = tl.max_contiguous(tl.arange(0, STEP), VECTOR)
    own_max = tl.full((THREADS,), EMPTY_MAX, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    moment = tl.zeros((THREADS,), tl.float32)
    whole = num_columns // STEP * STEP
    for start in range(0, whole, STEP):
        x = _own(tl.load(row + start + columns), VECTOR, THREADS)
        own_max, total, moment = _take(own_max, total, moment, x, scale, MOMENT)
    tail = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    for start in range(whole, num_columns, BLOCK):
        x = tl.load(row + start + tail, mask=start + tail < num_columns, other=float("-inf"))
        own_max, total, moment = _take(own_max, total, moment, _own(x, VECTOR, THREADS), scale, MOMENT)
    row_max = tl.max(own_max, 0)
    drop = _below(own_max, row_max)
    factor = tl.exp2(drop * scale)
    if MOMENT:
        moment = factor * (moment + drop * total)
    return row_max, tl.sum(total * factor, 0), tl.sum(moment, 0) * (scale * LN2)


@triton.jit
def combine_ranks(stats, num_ranks, rank_stride, inverse_temperature):
    """(M, log L, S / L, target logit) from every rank's (m, l, s, y) of one row, in rank order."""
    row_max = EMPTY_MAX * 1.0
    target_logit = float("-inf")
    for rank in range(num_ranks):
        row_max = larger(row_max, tl.load(stats + rank * rank_stride))
        target_logit = larger(target_logit, tl.load(stats + rank * rank_stride + 3))
    total = 0.0
    moment = 0.0
    for rank in range(num_ranks):
        own = stats + rank * rank_stride
        drop = larger((tl.load(own) - row_max) * inverse_temperature, LOWEST)
        factor = tl.exp(drop)
        own_total = tl.load(own + 1)
        total += factor * own_total
        moment += factor * (tl.load(own + 2) + drop * own_total)
    return row_max, tl.log(total), moment / total, target_logit


@triton.jit
def _dlogits(x, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY: tl.constexpr):
    if HAS_ENTROPY:
        d = _below(x, row_max)
        return tl.exp2(d * scale - log2_sum) * (constant + slope * d)
    else:
        return tl.exp2((x - row_max) * scale - log2_sum) * constant


@triton.jit
def write_zeros(out, first, last, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in range(first, last, BLOCK):
        tl.store(out + start + columns, zeros, mask=start + columns < last)


@triton.jit
def write_row_gradient(
    row,
    out,
    num_valid,
    num_columns,
    target,
    target_logit,
    row_max,
    log_sum,
    entropy,
    grad_logprob,
    grad_entropy,
    scale,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """out[j] = g (1[j = target] - p_j) - h p_j (log p_j + H) for j < num_valid, 0 up to num_columns.

    out may be row itself. target: the local column, or -1. g and h already carry 1 / temperature.
    """
    # with d = z - m: log p = d / temperature - log_sum, so p's factor is linear in d
    constant = -(grad_logprob + grad_entropy * (entropy - log_sum))
    slope = -grad_entropy * (scale * LN2)
    log2_sum = log_sum * LOG2E
    STEP: tl.constexpr = 4 * BLOCK
    columns = tl.max_contiguous(tl.arange(0, STEP), VECTOR)
    element = out.dtype.element_ty
    write_zeros(out, num_valid, num_columns, BLOCK)
    whole = num_valid // STEP * STEP
    tail = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    for start in range(whole, num_valid, BLOCK):
        inside = start + tail < num_valid
        x = tl.load(row + start + tail, mask=inside, other=float("-inf")).to(tl.float32)
        dz = _dlogits(x, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        tl.store(out + start + tail, dz.to(element), mask=inside)
    for step in range(whole // STEP):
        start = whole - (step + 1) * STEP
        x = tl.load(row + start + columns).to(tl.float32)
        dz = _dlogits(x, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        tl.store(out + start + columns, dz.to(element))
    if target >= 0:
        tl.debug_barrier()  # another thread has just written this column
        dz = _dlogits(target_logit, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        tl.store(out + target, (grad_logprob + dz).to(element))
