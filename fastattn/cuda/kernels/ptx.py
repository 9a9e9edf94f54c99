"""Instructions that Python has no word for, as inline PTX: for `unrolled` functions, on a GPU.

`emulated_ptx`, a module of the tests, has the same names in NumPy; `fastattn.cuda.kernels.primitives` is the one or the
other. What each instruction does is said there, in code.
"""

from __future__ import annotations

from llvmlite import ir
from numba.cuda import cgutils

from fastattn.cuda.kernels.registers import F32, I32, I64, ArrayValue, Value, as_value, builder, unrolled

__all__ = [
    "commit",
    "copy_async",
    "exp2",
    "fma",
    "global_address",
    "hold_loads",
    "load_byte",
    "load_float",
    "load_half",
    "load_matrices",
    "load_matrices_transposed",
    "load_shared",
    "load_word",
    "log2",
    "maximum",
    "minimum",
    "mma",
    "narrow",
    "opaque",
    "pack",
    "reciprocal",
    "select",
    "shared_memory",
    "shuffle",
    "shuffle_xor",
    "store_float",
    "store_pair",
    "store_shared",
    "thread_index",
    "unrolled",
    "wait",
    "warp_any",
    "warp_index",
    "widen",
]

GLOBAL, SHARED = 1, 3  # address spaces


def _call(text, returned, constraints, *arguments, effects=False, convergent=False):
    """Emit PTX; `returned` is LLVM's type of the result, a list of such for several, or None.

    `convergent`: all threads of a warp have to arrive, so that the compiler must not move it to where some do not.
    """
    several = isinstance(returned, list)
    if returned is None:
        kind = ir.VoidType()
    else:
        kind = ir.LiteralStructType(returned) if several else returned
    function = ir.FunctionType(kind, [a.type for a in arguments])
    # what has effects on memory must stay between those before and after it
    constraints = ",".join(filter(None, [constraints, "~{memory}" if effects else ""]))
    code = ir.InlineAsm(function, text, constraints, side_effect=effects)
    result = builder().call(code, arguments, attrs=("convergent",) if convergent else ())
    if several:
        return [Value(builder().extract_value(result, i)) for i in range(len(returned))]
    return None if returned is None else Value(result)


def _float(given):
    return as_value(given, F32).ir


def _integer(given):
    return as_value(given, I32).ir


# -- where and what ----------------------------------------------------------------------------------------------------


def thread_index():
    """The index of this thread in its block."""
    return _call("mov.u32 $0, %tid.x;", I32, "=r")


def warp_index():
    """The index of this warp in its block, which the assembler sees to be the same in all of its lanes."""
    return _call(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", I32, "=r,r", (thread_index() // 32).ir, effects=True, convergent=True
    )


def narrow(x):
    """An integer in 32 bits."""
    x = as_value(x, I64)
    return x if x.type == I32 else Value(builder().trunc(x.ir, I32))


def opaque(x):
    """The number itself, of which the compiler is not told so: it computes this, and what follows from it, here.

    It moves what does not change in a loop to before the loop, where each address that it finds takes a register all
    along, and what nobody waits for to the end, where all that it is computed from has to be kept.
    """
    x = as_value(x)
    letter, kind = ("f", "f32") if x.is_float else ("r", "b32") if x.type == I32 else ("l", "b64")
    return _call(f"mov.{kind} $0, $1;", x.type, f"={letter},{letter}", x.ir, effects=True)


def select(condition, yes, no):
    """yes where the condition holds, else no."""
    if isinstance(condition, bool):
        return yes if condition else no
    yes = as_value(yes, no.type if isinstance(no, Value) else None)
    no = as_value(no, yes.type)
    return Value(builder().select(condition.ir, yes.ir, no.ir))


# -- memory ------------------------------------------------------------------------------------------------------------


def shared_memory(size):
    """The address of `size` bytes of shared memory, one and the same wherever a kernel asks."""
    module = builder().module
    name = "fastattn_shared"
    memory = module.globals.get(name)
    if memory is None:
        memory = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), size), name, addrspace=SHARED)
        memory.align = 128
        memory.initializer = ir.Constant(memory.value_type, ir.Undefined)
    return Value(builder().ptrtoint(memory, I32))


def global_address(array: ArrayValue, index):
    """The address of an element of an array in global memory."""
    pointer = builder().addrspacecast(array.data, array.data.type.pointee.as_pointer(GLOBAL))
    first = Value(builder().ptrtoint(pointer, I64))
    return first + as_value(index, I64) * array.itemsize


def copy_async(to, source, size):
    """Begin to copy 16 bytes from global to shared memory, of which those beyond `size`, 0 or 16, are zeros."""
    text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
    _call(text, None, "r,l,r", to.ir, source.ir, _integer(size), effects=True)


def commit():
    """Make one group of the copies begun since the last."""
    _call("cp.async.commit_group;", None, "", effects=True)


def wait(groups):
    """Wait until no more than the last `groups` groups of copies are under way."""
    _call(f"cp.async.wait_group {groups};", None, "", effects=True)


def hold_loads():
    """Have the assembler load nothing before this that stands after it, though it could: that would take registers."""
    _call("bar.warp.sync -1;", None, "", effects=True)


def _load_matrices(address, suffix):
    text = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    return _call(text, [I32] * 4, "=r,=r,=r,=r,r", address.ir, effects=True, convergent=True)


def load_matrices(address):
    """Four matrices of 8 rows of 16 bytes; lane i says where row i % 8 of matrix i // 8 is."""
    return _load_matrices(address, "")


def load_matrices_transposed(address):
    """The same, each transposed."""
    return _load_matrices(address, ".trans")


def load_shared(address):
    """16 bytes of shared memory, in 4 registers."""
    text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    return _call(text, [I32] * 4, "=r,=r,=r,=r,r", address.ir, effects=True)


def load_word(address):
    """32 bits of shared memory."""
    return _call("ld.shared.b32 $0, [$1];", I32, "=r,r", address.ir, effects=True)


def _load(address, when, kind, letter, returned):
    """An element in global memory; 0, and nothing is read, in threads where `when` does not hold."""
    text = f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.{kind} $0, [$1]; }}"
    flag = builder().zext(when.ir, I32)
    return _call(text, returned, f"=&{letter},l,r", address.ir, flag, effects=True)


def load_byte(address, when):
    """A byte in global memory, 0 in threads where `when` does not hold."""
    return _load(address, when, "u8", "r", I32)


def load_half(address, when):
    """The bits of a half in global memory, 0 in threads where `when` does not hold."""
    return _load(address, when, "u16", "r", I32)


def load_float(address, when):
    """A float32 in global memory, 0 in threads where `when` does not hold."""
    return _load(address, when, "f32", "f", F32)


def store_shared(address, word):
    """Store 32 bits in shared memory."""
    _call("st.shared.b32 [$0], $1;", None, "r,r", address.ir, word.ir, effects=True)


def store_pair(address, word, when):
    """Store two halves, 32 bits, in global memory, in threads where `when` holds."""
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }"
    flag = builder().zext(when.ir, I32)
    _call(text, None, "l,r,r", address.ir, word.ir, flag, effects=True)


def store_float(address, x, when):
    """Store a float32 in global memory, in threads where `when` holds."""
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }"
    _call(text, None, "l,f,r", address.ir, _float(x), builder().zext(when.ir, I32), effects=True)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _pure(name, kind, *arguments):
    function = ir.FunctionType(kind, [a.type for a in arguments])
    return Value(builder().call(cgutils.get_or_insert_function(builder().module, function, name), arguments))


def fma(a, b, c):
    """a · b + c, rounded once."""
    return _pure("llvm.fma.f32", F32, _float(a), _float(b), _float(c))


def maximum(a, b):
    """The greater of two; of a number and NaN the number."""
    if any(isinstance(v, Value) and v.is_float for v in (a, b)):
        return _call("max.f32 $0, $1, $2;", F32, "=f,f,f", _float(a), _float(b))
    return _call("max.s32 $0, $1, $2;", I32, "=r,r,r", _integer(a), _integer(b))


def minimum(a, b):
    """The lesser of two integers."""
    return _call("min.s32 $0, $1, $2;", I32, "=r,r,r", _integer(a), _integer(b))


def exp2(x):
    """2^x, to 2 units in the last place; 0 where that is subnormal."""
    return _call("ex2.approx.ftz.f32 $0, $1;", F32, "=f,f", _float(x))


def log2(x):
    """The logarithm to base 2."""
    return _call("lg2.approx.ftz.f32 $0, $1;", F32, "=f,f", _float(x))


def reciprocal(x):
    """1 / x, to a unit in the last place."""
    return _call("rcp.approx.ftz.f32 $0, $1;", F32, "=f,f", _float(x))


def pack(low, high, storage):
    """Two float32 numbers as halves of the type `storage` in 32 bits, rounded to the nearest."""
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[storage]
    return _call(f"cvt.rn.{kind}.f32 $0, $1, $2;", I32, "=r,f,f", _float(high), _float(low))


def widen(bits, storage):
    """The float32 number that a half of the type `storage` is."""
    if storage == "bfloat16":
        return Value(builder().bitcast((bits << 16).ir, F32))
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }"
    return _call(text, F32, "=f,r", bits.ir)


# -- warps -------------------------------------------------------------------------------------------------------------


def shuffle_xor(x, mask):
    """The x of the lane whose index differs in the bits of `mask`."""
    text = "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;"
    x = as_value(x)
    letter = "f" if x.is_float else "r"
    return _call(text, x.type, f"={letter},{letter},n", x.ir, ir.Constant(I32, mask), effects=True, convergent=True)


def shuffle(x, lane):
    """The integer x of another lane."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    return _call(text, I32, "=r,r,r", _integer(x), _integer(lane), effects=True, convergent=True)


def warp_any(condition):
    """Whether the condition holds in any lane."""
    text = "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, -1; selp.b32 $0, 1, 0, q; }"
    found = _call(text, I32, "=r,r", builder().zext(as_value(condition).ir, I32), effects=True, convergent=True)
    return found != 0


def mma(a, b, c, storage):
    """c + a · b of a 16×16 and a 16×8 matrix of halves, in fragments of 4, 2 and 4 registers; sums are float32."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[storage]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    arguments = [*(_integer(v) for v in (*a, *b)), *(_float(v) for v in c)]
    return _call(text, [F32] * 4, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *arguments, convergent=True)
