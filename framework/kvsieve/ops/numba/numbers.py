"""Numbers inside the compiled loops: stored ones of any width as float32, and a power of two that vectorises.

Numba knows no bfloat16, and no arithmetic of float16. So stored numbers come as integers of the same bits:
float32 as uint32, bfloat16 as uint16, float16 as int16. They are widened in registers. (float32 too: the
compiler then knows that what a loop writes is not what it reads.)
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# The weight of what is this far below the largest is zero in float32, and no arithmetic overflows.
LOWEST = np.float32(-1e30)
_FLOAT, _WORD, _HALF = ir.FloatType(), ir.IntType(32), ir.HalfType()


@intrinsic
def widen(context: Any, number: Any) -> Any:
    """A stored number as float32: float32 handed over as uint32, bfloat16 as uint16, float16 as int16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (stored,) = arguments
        if number == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(stored, _WORD), _WORD(16)), _FLOAT)
        if number == types.int16:
            return builder.fpext(builder.bitcast(stored, _HALF), _FLOAT)
        return builder.bitcast(stored, _FLOAT)

    return types.float32(number), build


LANES = 16  # numbers in a vector: one AVX-512 register, or two of AVX2
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


@intrinsic
def add_products(
    context: Any,
    sums: Any,
    at: Any,
    stored: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any,
    p: Any,
    q: Any,
    r: Any,
    s: Any,
) -> Any:
    """Add to `sums[at : at + LANES]` p times the stored numbers from a on, q times those from b on, ...

    Spelled out for the compiler, which does not find vectors in loops as short as a block of keys.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        data = [_data(context, builder, signature, arguments, which) for which in (0, 2)]
        target = builder.bitcast(builder.gep(data[0], [arguments[1]]), _FLOATS.as_pointer())
        total = builder.load(target, align=4)
        for begin, factor in zip(arguments[3:7], arguments[7:11], strict=True):
            first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), factor, _WORD(0))
            factors = builder.shuffle_vector(first, first, ir.Constant(_WORDS, [0] * LANES))
            product = builder.fmul(_load_wide(builder, stored, data[1], begin), factors, flags=("fast",))
            total = builder.fadd(total, product, flags=("fast",))
        builder.store(total, target, align=4)

    return types.void(sums, at, stored, a, b, c, d, p, q, r, s), build


@intrinsic
def put_dots(
    context: Any, dots: Any, at: Any, query: Any, stored: Any, a: Any, b: Any, c: Any, d: Any
) -> Any:
    """Write to `dots[at : at + 4]` the products of `query`, whole LANES, with as many stored numbers from a
    on, from b on, ...
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        data = [_data(context, builder, signature, arguments, which) for which in (0, 2, 3)]
        size = context.make_array(query)(context, builder, arguments[2]).nitems
        zeros = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(4)]
        lanes = ir.Constant(size.type, LANES)
        with cgutils.for_range_slice(builder, ir.Constant(size.type, 0), size, lanes, size.type) as (i, _):
            factors = builder.load(builder.bitcast(builder.gep(data[1], [i]), _FLOATS.as_pointer()), align=4)
            for total, begin in zip(sums, arguments[4:8], strict=True):
                numbers = _load_wide(builder, stored, data[2], builder.add(begin, i))
                product = builder.fmul(numbers, factors, flags=("fast",))
                builder.store(builder.fadd(builder.load(total), product, flags=("fast",)), total)
        a, b, c, d = (builder.load(total) for total in sums)
        fours = add_neighbours(builder, add_neighbours(builder, a, b), add_neighbours(builder, c, d))
        while fours.type.count > 4:
            fours = add_halves(builder, fours)
        target = builder.bitcast(builder.gep(data[0], [arguments[1]]), fours.type.as_pointer())
        builder.store(fours, target, align=4)

    def add_neighbours(builder: Any, left: Any, right: Any) -> Any:
        """Of every four numbers: the sums of two neighbours of `left`, then those of `right`."""
        even = [four + j for four in range(0, LANES, 4) for j in (0, 2, LANES, LANES + 2)]
        odd = [place + 1 for place in even]
        picked = (builder.shuffle_vector(left, right, ir.Constant(_WORDS, places)) for places in (even, odd))
        return builder.fadd(*picked, flags=("fast",))

    def add_halves(builder: Any, vector: Any) -> Any:
        half = vector.type.count // 2
        words = ir.VectorType(_WORD, half)
        low = ir.Constant(words, list(range(half)))
        high = ir.Constant(words, list(range(half, 2 * half)))
        halves = (builder.shuffle_vector(vector, vector, places) for places in (low, high))
        return builder.fadd(*halves, flags=("fast",))

    return types.void(dots, at, query, stored, a, b, c, d), build


def _data(context: Any, builder: Any, signature: Any, arguments: Any, which: int) -> Any:
    """The pointer to the numbers of the argument `which`, an array."""
    return context.make_array(signature.args[which])(context, builder, arguments[which]).data


def _load_wide(builder: Any, stored: Any, data: Any, begin: Any) -> Any:
    """Load LANES stored numbers from `data[begin]` on as float32."""
    kind = ir.VectorType(data.type.pointee, LANES)
    numbers = builder.load(
        builder.bitcast(builder.gep(data, [begin]), kind.as_pointer()), align=stored.dtype.bitwidth // 8
    )
    if stored.dtype == types.int16:
        return builder.fpext(builder.bitcast(numbers, ir.VectorType(_HALF, LANES)), _FLOATS)
    if stored.dtype == types.uint16:
        numbers = builder.shl(builder.zext(numbers, _WORDS), ir.Constant(_WORDS, [16] * LANES))
    return builder.bitcast(numbers, _FLOATS)


@intrinsic
def take_apart(
    context: Any, numbers: Any, at: Any, step: Any, high: Any, codes: Any, begins: Any, c: Any
) -> Any:
    """Take four bytes of LANES vectors apart, from `codes[begins[i] + c]` on, as float32.

    The low half of byte j of vector i goes to `numbers[at + j * step + i]`, the high half `high` behind it.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        target, bytes_, places = (_data(context, builder, signature, arguments, n) for n in (0, 4, 5))
        taken = ir.Constant(_WORDS, ir.Undefined)
        for i in range(LANES):
            begin = builder.add(builder.load(builder.gep(places, [_WORD(i)])), arguments[6])
            four = builder.load(builder.bitcast(builder.gep(bytes_, [begin]), _WORD.as_pointer()), align=1)
            taken = builder.insert_element(taken, four, _WORD(i))
        first, step, high = arguments[1:4]
        for j in range(4):
            for nibble, place in ((0, first), (1, builder.add(first, high))):
                shift = ir.Constant(_WORDS, [8 * j + 4 * nibble] * LANES)
                number = builder.and_(builder.lshr(taken, shift), ir.Constant(_WORDS, [15] * LANES))
                vector = builder.bitcast(builder.gep(target, [place]), _FLOATS.as_pointer())
                builder.store(builder.uitofp(number, _FLOATS), vector, align=4)
            first = builder.add(first, step)

    return types.void(numbers, at, step, high, codes, begins, c), build


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), build


@intrinsic
def _bits_of(context: Any, number: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _WORD)

    return types.int32(types.float32), build


@intrinsic
def _nearest(context: Any, number: Any) -> Any:
    """The nearest whole number, as float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [_FLOAT]), arguments)

    return types.float32(types.float32), build


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of two finite numbers. (`max` asks for NaN, one number at a time.)"""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b, flags=("fast",)), a, b, flags=("fast",))

    return types.float32(types.float32, types.float32), build


@njit(inline="always")
def finite(number: Any) -> Any:
    """The number, or LOWEST if it is NaN or infinite: asked of its bits, as the loops assume finite ones."""
    exponent = _bits_of(number) & np.int32(0x7F800000)
    return LOWEST if exponent == np.int32(0x7F800000) else number


@njit(inline="always")
def bounded(number: Any) -> Any:
    """The number; LOWEST for minus infinity, and the highest of all for infinity and NaN."""
    bits: Any = _bits_of(number)
    if bits & np.int32(0x7F800000) != np.int32(0x7F800000):
        return number
    return LOWEST if bits == np.int32(-0x800000) else -LOWEST


@njit(inline="always")
def exp2(x: Any) -> Any:
    """2 ** x for x <= 0, in float32, to about 1e-7 of it; below -126 it is 2 ** -126."""
    x = larger(x, np.float32(-126))
    whole = _nearest(x)
    t = (x - whole) * np.float32(0.6931471805599453)
    # The series of e ** t, |t| < 0.35, to the seventh power.
    series = np.float32(1 / 720) + t * np.float32(1 / 5040)
    series = np.float32(1 / 24) + t * (np.float32(1 / 120) + t * series)
    series = np.float32(1) + t * (
        np.float32(1) + t * (np.float32(0.5) + t * (np.float32(1 / 6) + t * series))
    )
    return series * _float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


@intrinsic
def prefetch(context: Any, stored: Any, at: Any) -> Any:
    """Ask for the line of memory with `stored[at]`, ahead of its use; there need not be such a number."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _WORD, _WORD, _WORD])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, _WORD(0), _WORD(3), _WORD(1)])  # to read, into all levels, as data

    return types.void(stored, at), build
