"""Philox4x32-10: random words that are a keyed mixing of a counter, and nothing else.

Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.simd.tile import TileType, is_shape, make_tile, splat, vector_of

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW_32 = 0xFFFFFFFF


@intrinsic
def keep_rows(typingctx, shape, group, query, head, batch, seed, drop_below):
    """1 where an element is kept, else 0: a tile of 4 keys, 4 · group and on, by the queries from `query` on."""
    if not is_shape(shape):
        return None
    rows = shape.value.quad
    result = TileType(rows)

    def codegen(context, builder, sig, values):
        word = ir.IntType(64)
        vector = ir.VectorType(word, rows.lanes)
        low = ir.Constant(vector, [LOW_32] * rows.lanes)
        half = ir.Constant(vector, [32] * rows.lanes)

        def constant(value):
            return ir.Constant(vector, [value] * rows.lanes)

        lanes = ir.Constant(vector, list(range(rows.lanes)))
        group, query, head, batch, seed, limit = (splat(builder, value, rows.lanes) for value in values[1:])
        counter = group, builder.add(query, lanes), head, batch
        c0, c1, c2, c3 = (builder.and_(word_, low) for word_ in counter)
        k0, k1 = builder.and_(seed, low), builder.lshr(seed, half)
        for _ in range(ROUNDS):
            first, second = builder.mul(c0, constant(MULTIPLIERS[0])), builder.mul(c2, constant(MULTIPLIERS[1]))
            c0 = builder.xor(builder.xor(builder.lshr(second, half), c1), k0)
            c2 = builder.xor(builder.xor(builder.lshr(first, half), c3), k1)
            c1, c3 = builder.and_(second, low), builder.and_(first, low)
            k0 = builder.and_(builder.add(k0, constant(WEYL[0])), low)
            k1 = builder.and_(builder.add(k1, constant(WEYL[1])), low)
        kept = [builder.icmp_unsigned(">=", random, limit) for random in (c0, c1, c2, c3)]
        return make_tile(builder, rows, [builder.uitofp(flags, vector_of(rows)) for flags in kept])

    return signature(result, shape, *[types.int64] * 6), codegen
