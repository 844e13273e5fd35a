"""Device functions that the Triton kernels share: one program owns one row of logits.

Reading a row once yields m = max z, l = sum e^((z - m) / temperature) and s = sum (z - m) / temperature *
e^((z - m) / temperature); see torch_rows.py for what follows from them. Exponentials are taken to base 2, which
is what the hardware computes. Design, for sm_80 and newer:
- Running values are kept per lane and merged once at the row's end: no reduction across lanes inside the loop.
- Four independent 16-byte loads are in flight per thread, and rescaling the running sums costs one exponential
  for four columns: with two exponentials a column the special-function units, not memory, would set the pace.
- Whole steps carry no mask; only the tail does.
- The second read runs backwards, because the row's end is what the caches still hold.
- Differences are clamped, not guarded: 2^-200 is 0 in float32, so a -inf logit contributes 0 and never
  inf - inf; a NaN passes through every maximum, so a broken logit is not mistaken for an improbable one.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EMPTY_MAX = tl.constexpr(-1e30)
NEVER = tl.constexpr(-200.0)
MAX_LOG_RATIO = tl.constexpr(20.0)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def load_columns(row, columns):
    return tl.load(row + columns).to(tl.float32)


@triton.jit
def shifted(x, row_max, scale):
    """(x - max) in units of log2, at least NEVER."""
    return tl.maximum((x - row_max) * scale, NEVER, propagate_nan=_ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=_ALL)


@triton.jit
def _rescale(lane_max, total, moment, new_max, scale, MOMENT: tl.constexpr):
    """Sums relative to a new maximum."""
    drop = shifted(lane_max, new_max, scale)
    factor = tl.exp2(drop)
    if MOMENT:
        moment = factor * (moment + drop * total)
    return total * factor, moment


@triton.jit
def _take(total, moment, x, new_max, scale, MOMENT: tl.constexpr):
    """Sums with one more column per lane."""
    if MOMENT:
        d = shifted(x, new_max, scale)
        e = tl.exp2(d)
        moment += d * e
    else:
        e = tl.exp2((x - new_max) * scale)  # of -inf it is 0 without the clamp
    return total + e, moment


@triton.jit
def row_statistics(row, num_columns, scale, MOMENT: tl.constexpr, BLOCK: tl.constexpr):
    """(m, l, s) of one row; scale = log2(e) / temperature. m is of z itself, s in natural units, 0 without MOMENT."""
    columns = tl.arange(0, BLOCK)
    lane_max = tl.full((BLOCK,), EMPTY_MAX, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    whole = num_columns // (4 * BLOCK) * (4 * BLOCK)
    for start in range(0, whole, 4 * BLOCK):
        x0 = load_columns(row + start, columns)
        x1 = load_columns(row + start + BLOCK, columns)
        x2 = load_columns(row + start + 2 * BLOCK, columns)
        x3 = load_columns(row + start + 3 * BLOCK, columns)
        new_max = larger(larger(larger(x0, x1), larger(x2, x3)), lane_max)
        total, moment = _rescale(lane_max, total, moment, new_max, scale, MOMENT)
        total, moment = _take(total, moment, x0, new_max, scale, MOMENT)
        total, moment = _take(total, moment, x1, new_max, scale, MOMENT)
        total, moment = _take(total, moment, x2, new_max, scale, MOMENT)
        total, moment = _take(total, moment, x3, new_max, scale, MOMENT)
        lane_max = new_max
    for start in range(whole, num_columns, BLOCK):
        inside = start + columns < num_columns
        x = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new_max = larger(x, lane_max)
        total, moment = _rescale(lane_max, total, moment, new_max, scale, MOMENT)
        total, moment = _take(total, moment, x, new_max, scale, MOMENT)
        lane_max = new_max
    # NaN in a lane's maximum must survive the reduction, which keeps the larger number.
    row_max = tl.where(tl.sum((lane_max != lane_max).to(tl.int32), 0) > 0, float("nan"), tl.max(lane_max, 0))
    total, moment = _rescale(lane_max, total, moment, row_max, scale, MOMENT)
    return row_max, tl.sum(total, 0), tl.sum(moment, 0) * LN2


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
        drop = (tl.load(own) - row_max) * inverse_temperature
        factor = tl.exp(drop)
        own_total = tl.load(own + 1)
        total += factor * own_total
        moment += factor * (tl.load(own + 2) + drop * own_total)
    return row_max, tl.log(total), moment / total, target_logit


@triton.jit
def _dlogits(x, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY: tl.constexpr):
    d = shifted(x, row_max, scale)
    p = tl.exp2(d - log2_sum)
    return p * (constant + slope * d) if HAS_ENTROPY else p * constant


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
):
    """out[j] = g (1[j = target] - p_j) - h p_j (log p_j + H) for j < num_valid, 0 up to num_columns.

    out may be row itself. target: the local column, or -1. g and h already carry 1 / temperature.
    """
    # with d = (z - m) in log2 units: log p = d ln2 - log_sum, so p's factor is linear in d
    constant = -(grad_logprob + grad_entropy * (entropy - log_sum))
    slope = -grad_entropy * LN2
    log2_sum = log_sum * LOG2E
    columns = tl.arange(0, BLOCK)
    element = out.dtype.element_ty
    write_zeros(out, num_valid, num_columns, BLOCK)
    whole = num_valid // (4 * BLOCK) * (4 * BLOCK)
    for start in range(whole, num_valid, BLOCK):
        inside = start + columns < num_valid
        x = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        dz = _dlogits(x, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        tl.store(out + start + columns, dz.to(element), mask=inside)
    for step in range(whole // (4 * BLOCK)):
        start = whole - (step + 1) * (4 * BLOCK)
        x0 = load_columns(row + start, columns)
        x1 = load_columns(row + start + BLOCK, columns)
        x2 = load_columns(row + start + 2 * BLOCK, columns)
        x3 = load_columns(row + start + 3 * BLOCK, columns)
        z0 = _dlogits(x0, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        z1 = _dlogits(x1, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        z2 = _dlogits(x2, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        z3 = _dlogits(x3, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        tl.store(out + start + columns, z0.to(element))
        tl.store(out + start + BLOCK + columns, z1.to(element))
        tl.store(out + start + 2 * BLOCK + columns, z2.to(element))
        tl.store(out + start + 3 * BLOCK + columns, z3.to(element))
    if target >= 0:
        tl.debug_barrier()  # another thread has just written this column
        dz = _dlogits(target_logit, row_max, log2_sum, constant, slope, scale, HAS_ENTROPY)
        tl.store(out + target, (grad_logprob + dz).to(element))
