"""What the Triton kernels share: how rows and keys map to tiles, the neighbourhood, and the exact top-k selection.

A program works on ROWS rows: PACK query heads that share one kv head, at ROWS / PACK positions that follow each other
(row = position * PACK + head), so that keys and values are read once for all of them. Tensors are contiguous `b s h d`,
numbers of one row `b s h`, |k|^2 / 2 `b h_kv s_k`. Positions on the key axis: i of queries, j of keys.

A number that is not finite can reach all rows whose tiles it lies in, for there it is multiplied by zero; in the
forward pass, a key or query reaches only those that see it.

Offsets are 64-bit up to the corner of a tile, 32-bit within it: whole tiles of 64-bit pointers would cost registers.

Shapes: r rows, c columns (keys of one tile), D the head size's next power of two. Upper case: known when compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

WINDOW = tl.constexpr(0)  # KIND: what a query sees; the other two are the metrics of a Grid
MANHATTAN = tl.constexpr(1)
CHEBYSHEV = tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)

# What the kernels take as it comes. Triton would compile anew for integers that are 1 or multiples of 16: for other
# lengths of a text, or other seeds.
INTEGERS = ["s", "s_k", "h", "h_kv", "window", "width", "radius", "seed", "dropout_threshold", "top_k"]


@triton.jit
def block_of_rows(s, h, ROWS: tl.constexpr, PACK: tl.constexpr):
    """Of this program: sequence, position of its first row, first head, and that row's index in [b, s, h]."""
    blocks = tl.cdiv(s, ROWS // PACK)
    unit = tl.program_id(0) // blocks
    batch = (unit // (h // PACK)).to(tl.int64)
    start = tl.program_id(0) % blocks * (ROWS // PACK)
    head = unit % (h // PACK) * PACK
    return batch, start, head, (batch * s + start) * h + head


@triton.jit
def inverse_variances(log_sigma, head, lane, ROWS: tl.constexpr, PACK: tl.constexpr):
    """sigma^-2 [r] of each row's head; one number where a program has one head."""
    if PACK == 1:
        return tl.full([ROWS], tl.exp(-2 * tl.load(log_sigma + head).to(tl.float32)), tl.float32)
    return tl.exp(-2 * tl.load(log_sigma + head + lane).to(tl.float32))


@triton.jit
def first_keys(doc_start, batch, position, s, s_k, window, KIND: tl.constexpr, DOCS: tl.constexpr):
    """The first key that the query at each position may see, on the key axis; none at positions beyond the last."""
    first = position * 0
    if KIND == WINDOW:
        first = tl.maximum(position + (s_k - s) - window + 1, 0)
    if DOCS:
        first = tl.maximum(first, tl.load(doc_start + batch * s + position, mask=position < s, other=0))
    return tl.where(position < s, first, 2**30)


@triton.jit
def is_seen(i, j, first, s_k, width, radius, KIND: tl.constexpr, CLS: tl.constexpr):
    """Whether the query at i, whose first key is `first`, sees the key at j. Any shapes that broadcast."""
    if KIND == WINDOW:  # first <= j <= i in one comparison: what is negative is large as an unsigned integer
        seen = (j - first).to(tl.uint32, bitcast=True) < tl.maximum(i - first + 1, 0).to(tl.uint32, bitcast=True)
    else:
        down = tl.abs((i - CLS) // width - (j - CLS) // width)
        across = tl.abs((i - CLS) % width - (j - CLS) % width)
        near = (down + across if KIND == MANHATTAN else tl.maximum(down, across)) <= radius
        if CLS:
            near = near | (i == 0) | (j == 0)
        seen = near & (j >= first) & (j < s_k)
    return seen


@triton.jit
def grid_tiles(low, high, end, width, radius, TILE: tl.constexpr, CLS: tl.constexpr):
    """(start, number) of the tiles that hold all of the grid's `end` tokens which the tokens low .. high see. A CLS
    token's tile comes before them: see `tile_start`."""
    reach = radius * width + radius
    first, last = tl.maximum(low - reach, 0) // TILE, tl.minimum(high + reach, end - 1) // TILE
    if CLS:
        first = tl.maximum(tl.where(low == 0, 0, first), 1)
        last = tl.where(low == 0, (end - 1) // TILE, last)
    return first * TILE, tl.maximum(last - first + 1, 0) + CLS


@triton.jit
def tile_start(start, t, TILE: tl.constexpr, CLS: tl.constexpr):
    """Where the t-th tile from `start` begins; with a CLS token, tile 0 is the one that holds it."""
    return tl.where(t == 0, 0, start + (t - 1) * TILE) if CLS else start + t * TILE


@triton.jit
def load_rows(pointer, offset, mask, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """[r, D]: rows of HEAD_DIM numbers at `offset` rows [r] behind the pointer; zeros where masked, if there is a
    mask."""
    d = tl.arange(0, D)
    pointers = pointer + (offset[:, None] * HEAD_DIM + d[None, :])
    if HEAD_DIM != D:
        mask = (d < HEAD_DIM)[None, :] if mask is None else mask[:, None] & (d < HEAD_DIM)[None, :]
    elif mask is not None:
        mask = mask[:, None]
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, offset, value, mask, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    mask = mask[:, None]
    if HEAD_DIM != D:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(pointer + (offset[:, None] * HEAD_DIM + d[None, :]), value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_sequence(start, column, s_k):
    """`column` such that start + column is a key's position: what would lie beyond an end is the key there again. It is
    cheaper than masked loads; what masks the scores hides it."""
    return tl.minimum(tl.maximum(column, -start), s_k - 1 - start)


@triton.jit
def load_keys(pointer, start, column, s_k, h_kv, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """[c, D]: keys or values at start + column of one sequence and kv head."""
    offset = in_sequence(start, column, s_k) * h_kv
    return load_rows(pointer + start.to(tl.int64) * (h_kv * HEAD_DIM), offset, None, HEAD_DIM, D)


@triton.jit
def multiply(a, b, plus=None):
    """a @ b, or a @ b + plus, summed in float32. float32 operands are multiplied as three TF32 products, good to some
    2^-21: the "ieee" products of Triton are scalar, and compile to thousands of spills."""
    return tl.dot(a, b, plus, input_precision="tf32x3")


@triton.jit
def score_tile(
    q, k, half_squares, start, column, s_k, h_kv, HEAD_DIM: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr
):
    """z [r, c] of the rows q [r, D] and the keys at start + column, unmasked."""
    keys = tl.trans(load_keys(k, start, column, s_k, h_kv, HEAD_DIM, D))
    if BIAS:
        bias = tl.load(half_squares + (start + in_sequence(start, column, s_k)))[None, :]
        z = multiply(q, keys, tl.broadcast_to(-bias, [q.shape[0], column.shape[0]]))
    else:
        z = multiply(q, keys)
    return z


@triton.jit
def dropout_factor(seed, threshold, scale, head, i, j):
    """What dropout multiplies a weight with: 0 or scale. The mask is the one of `ops/dropout.py`; threshold: its bound
    on the 32 random bits, less 2^31, so that it is an int32."""
    zero = (head * 0 + i * 0 + j * 0).to(tl.int32)  # 32-bit counters make it Philox-4x32
    bits, _, _, _ = tl.philox(seed, zero + j, zero + i, zero + head.to(tl.int32), zero)
    return tl.where((bits.to(tl.int32, bitcast=True) ^ -(2**31)) >= threshold, scale, 0.0)


@triton.jit
def count_not_below(tiles, bound, TILES: tl.constexpr):
    """How many z of each row are >= bound [r], as float32: comparing and adding floats costs half of counting ints."""
    counts = (tiles[0] >= bound[:, None]).to(tl.float32)
    for t in tl.static_range(1, TILES):
        counts += (tiles[t] >= bound[:, None]).to(tl.float32)
    return tl.sum(counts, 1)


@triton.jit
def largest_below(tiles, bound, TILES: tl.constexpr):
    """The largest z < bound of each row, [r]; -inf if there is none."""
    largest = tl.max(tl.where(tiles[0] < bound[:, None], tiles[0], float("-inf")), 1)
    for t in tl.static_range(1, TILES):
        largest = tl.maximum(largest, tl.max(tl.where(tiles[t] < bound[:, None], tiles[t], float("-inf")), 1))
    return largest


@triton.jit
def narrow(tiles, guess, low, num_low, high, num_high, done, k, TILES: tl.constexpr):
    """One pass of `select`: moves low or high to the guess, unless the row is done."""
    count = count_not_below(tiles, guess, TILES)
    enough = count >= k
    low, num_low = tl.where(enough & ~done, guess, low), tl.where(enough & ~done, count, num_low)
    high, num_high = tl.where(enough | done, high, guess), tl.where(enough | done, num_high, count)
    return low, num_low, high, num_high, done | (num_low == k) | (num_high == k - 1)


@triton.jit
def interpolate(low, num_low, high, num_high, k):
    """Where the k-th would be, were the scores between low and high spread evenly."""
    share = (num_low - k + 0.5) / (num_low - num_high)
    return low + (high - low) * tl.minimum(tl.maximum(share, 0.02), 0.98)


@triton.jit
def select(tiles, whole, num_seen, top_k, TILES: tl.constexpr):
    """Exact top-k of rows that lie in registers as a tuple of tiles [r, c], -inf where not seen. whole: whether all is
    seen.

    Returns (cut, separator, highest), [r]. z >= cut is kept, which is the top_k largest and all ties with the last of
    them. `separator` keeps the same keys of a z that was computed again in another order of summation: it lies half-way
    down to the next smaller z. Both are -inf for rows that see at most top_k keys.

    A bracket low <= k-th z < high is narrowed by counting. The first guess is the quantile of a normal distribution
    with the row's mean and variance, the second goes on from it with that distribution's density; the next ones
    interpolate on rank, and later ones also halve. A row is done when exactly k are >= low, or k - 1 are >= high, for
    then the k-th is the largest below high. Rows with ties across the k-th, and any that are left after MAX_PASSES,
    walk down from high, value by value. On normally distributed rows the slowest of 64 takes 6 passes; the first few
    are not worth asking all warps whether they are done."""
    FIRST_PASSES: tl.constexpr = 4
    MAX_PASSES: tl.constexpr = 16  # after the first
    n = num_seen.to(tl.float32)
    k = top_k.to(tl.float32)
    total, squares = n * 0, n * 0
    low, highest = n * 0 + float("inf"), n * 0 + float("-inf")
    if whole:  # masks would cost as much again
        for t in tl.static_range(TILES):
            total += tl.sum(tiles[t], 1)
            squares += tl.sum(tiles[t] * tiles[t], 1)
            low = tl.minimum(low, tl.min(tiles[t], 1))
            highest = tl.maximum(highest, tl.max(tiles[t], 1))
    else:
        for t in tl.static_range(TILES):
            seen = tiles[t] > float("-inf")
            z = tl.where(seen, tiles[t], 0.0)
            total += tl.sum(z, 1)
            squares += tl.sum(z * z, 1)
            low = tl.minimum(low, tl.min(tl.where(seen, tiles[t], float("inf")), 1))
            highest = tl.maximum(highest, tl.max(tiles[t], 1))
    low = tl.maximum(low, -3.0e38)  # a seen score may be -inf, that of a key which is infinitely far
    high = highest + tl.maximum(tl.abs(low), tl.abs(highest)) * 2.0**-21 + 2.0**-100  # now none is >= high
    num_low, num_high = n, n * 0

    all_kept = n <= k
    done = all_kept | (num_high == k - 1)
    mean = total / tl.maximum(n, 1.0)
    deviation = tl.sqrt(tl.maximum(squares / tl.maximum(n, 1.0) - mean * mean, 0.0))
    others = tl.maximum(n - k, 0.5)
    guess = mean + deviation * (tl.log(others / k) / 1.702)  # the normal quantile, to 0.01 or so
    guess = tl.where((guess > low) & (guess < high), guess, (low + high) / 2)
    low, num_low, high, num_high, done = narrow(tiles, guess, low, num_low, high, num_high, done, k, TILES)
    missed = tl.where(guess == low, num_low, num_high) - k + 0.5
    guess += missed * deviation * (n / (1.702 * k * others))
    guess = tl.where((guess > low) & (guess < high), guess, interpolate(low, num_low, high, num_high, k))
    for _ in range(FIRST_PASSES):
        low, num_low, high, num_high, done = narrow(tiles, guess, low, num_low, high, num_high, done, k, TILES)
        guess = interpolate(low, num_low, high, num_high, k)
    passes = 0
    busy = tl.max((~done).to(tl.int32), 0)
    while busy > 0:
        low, num_low, high, num_high, done = narrow(tiles, guess, low, num_low, high, num_high, done, k, TILES)
        passes += 1
        halves = passes % 2 == 0
        guess = tl.where(halves, low + (high - low) * 0.5, interpolate(low, num_low, high, num_high, k))
        busy = tl.where(passes < MAX_PASSES - FIRST_PASSES, tl.max((~done).to(tl.int32), 0), 0)

    split = num_low == k  # exactly k lie at or above low
    kth = largest_below(tiles, high, TILES)
    done = all_kept | split | (num_high == k - 1)
    busy = tl.max((~done).to(tl.int32), 0)
    for _ in range(tl.where(busy > 0, top_k, 0)):  # Triton 3.7 fails to compile a second `while` here
        if busy > 0:
            done = done | ~(count_not_below(tiles, kth, TILES) < k)  # so written, NaN ends the walk too
            kth = tl.where(done, kth, largest_below(tiles, kth, TILES))
            busy = tl.max((~done).to(tl.int32), 0)
    cut = tl.where(split, low, kth)
    below, above = around(tiles, cut, TILES)
    separator = cut + (above + below) * 0.5
    separator = tl.where(separator > cut + below, separator, tl.where(below == float("-inf"), below, cut))
    return tl.where(all_kept, float("-inf"), cut), tl.where(all_kept, float("-inf"), separator), highest


@triton.jit
def around(tiles, bound, TILES: tl.constexpr):
    """From the bound of each row, [r]: down to the largest z < bound, negative, -inf if there is none; and up to the
    smallest z >= bound, which must exist.

    The bits of differences, read as unsigned integers, are smallest for the smallest that is not negative; read as
    signed ones, for the negative one that is nearest to zero. That takes two comparisons of a score instead of six."""
    difference = tiles[0] - bound[:, None]
    down = tl.min(difference.to(tl.int32, bitcast=True), 1)
    up = tl.min(difference.to(tl.uint32, bitcast=True), 1)
    for t in tl.static_range(1, TILES):
        difference = tiles[t] - bound[:, None]
        down = tl.minimum(down, tl.min(difference.to(tl.int32, bitcast=True), 1))
        up = tl.minimum(up, tl.min(difference.to(tl.uint32, bitcast=True), 1))
    down = tl.where(down < 0, down.to(tl.float32, bitcast=True), float("-inf"))
    return down, up.to(tl.float32, bitcast=True)
