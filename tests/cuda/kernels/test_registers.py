"""What `unrolled` functions become: the same numbers in machine code as in Python.

A process of its own traces them, as numba.cuda's compiler is not there where the simulator is, and runs the code on the
CPU: arithmetic, comparisons and selections are LLVM's own instructions, the same for every machine.
"""

from __future__ import annotations

import processes

CODE = '''
import ctypes, itertools, math
from llvmlite import binding, ir
import fastattn.cuda.kernels.registers as registers
from fastattn.cuda.kernels.registers import F32, I32, I64, Value, as_value
from fastattn.cuda.kernels import ptx
from fastattn.cuda.kernels.ptx import narrow, select, widen

binding.initialize_native_target()
binding.initialize_native_asmprinter()

def on_cpu(function, kinds, returned):
    """The function's code for the CPU, as a Python function."""
    module = ir.Module()
    module.triple = binding.get_default_triple()
    emitted = ir.Function(module, ir.FunctionType(returned, kinds), "emitted")
    builder = ir.IRBuilder(emitted.append_basic_block())
    registers._builders.append(builder)
    result = as_value(function(*map(Value, emitted.args)))
    if result.type == ir.IntType(1):
        result = Value(builder.zext(result.ir, I32))
    registers._builders.pop()
    assert result.type == returned, (result.type, returned)
    builder.ret(result.ir)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    engine = binding.create_mcjit_compiler(parsed, binding.Target.from_default_triple().create_target_machine())
    engine.finalize_object()
    native = {I32: ctypes.c_int32, I64: ctypes.c_int64, F32: ctypes.c_float}
    call = ctypes.CFUNCTYPE(native[returned], *(native[kind] for kind in kinds))(engine.get_function_address("emitted"))
    call.engine = engine
    return call

def check(function, kinds, returned, cases, expected=None):
    call = on_cpu(function, kinds, returned)
    for case in cases:
        got, want = call(*case), (expected or function)(*case)
        assert got == want or got != got and want != want, (case, got, want)

pairs = list(itertools.product([0, 1, 5, 31, 127, 4096], [1, 2, 7, 8, 64]))
signed = list(itertools.product([-4096, -1, 0, 3, 2**30], [-7, 0, 1, 1000]))
for function in (
    lambda a, b: a // b, lambda a, b: a % b, lambda a, b: a % 8 ^ b % 8, lambda a, b: a // 4 * 4 + b % 4 // 2,
    lambda a, b: a & 7 | b, lambda a, b: (a << 2) + (b >> 1), lambda a, b: 5 - a * 3 + b,
):
    check(function, [I32, I32], I32, pairs)
for function in (
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: -a, lambda a, b: a < b, lambda a, b: a <= b,
    lambda a, b: a > b, lambda a, b: a >= b, lambda a, b: a == b, lambda a, b: a != b, lambda a, b: a < 3,
):
    check(function, [I32, I32], I32, signed, lambda a, b, f=function: int(f(a, b)))
check(lambda a, b: select(a < b, a, b), [I32, I32], I32, signed, min)
check(lambda a, b: select((a < b) & (a > 0), 1, 0), [I32, I32], I32, signed, lambda a, b: int(0 < a < b))
# 32 bits beside 64, and masks that are negative in 32
check(lambda a, b: a * (b * 2), [I32, I64], I64, [(-3, 2**40), (2**30, 2**20)])
check(lambda a, b: narrow(a) + b, [I64, I32], I32, [(-5, 2), (2**31 - 5, 4)], lambda a, b: a + b)
check(lambda a, b: a & 0xFFFF0000 | b, [I32, I32], I32, [(0x7FFF1234, 1)])
check(lambda a, b: (a >> 16) + b, [I32, I32], I32, [(-1, 0)], lambda a, b: 0xFFFF)  # a register has no sign

inf, nan = math.inf, math.nan
floats = list(itertools.product([0.0, -1.5, 2.0, inf, -inf, nan], [1.0, -2.0, inf, nan]))
for function in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: 2.0 - a, lambda a, b: -a):
    check(function, [F32, F32], F32, floats)
for function in (
    lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: a > b, lambda a, b: a >= b, lambda a, b: a == b,
    lambda a, b: a != b, lambda a, b: a == -inf,
):
    check(function, [F32, F32], I32, floats, lambda a, b, f=function: int(f(a, b)))
check(lambda a, b: select(a == -inf, 0.0, a * b), [F32, F32], F32, floats, lambda a, b: 0.0 if a == -inf else a * b)
check(lambda a: widen(a, "bfloat16"), [I32], F32, [(0x3FC0,), (0xFF80,)], lambda a: {0x3FC0: 1.5, 0xFF80: -inf}[a])

call = on_cpu(lambda a: -a, [F32], F32)
assert math.copysign(1, call(0.0)) == -1

# what a warp does together is not moved to where some of its lanes do not come
module = ir.Module()
emitted = ir.Function(module, ir.FunctionType(ir.VoidType(), [I32, F32]), "emitted")
registers._builders.append(ir.IRBuilder(emitted.append_basic_block()))
word, number = map(Value, emitted.args)
ptx.warp_index(), ptx.load_matrices(word), ptx.load_matrices_transposed(word), ptx.shuffle(word, word)
ptx.shuffle_xor(number, 1), ptx.warp_any(word), ptx.mma([word] * 4, [word] * 2, [number] * 4, "float16")
registers._builders.pop()
together = [line for line in str(module).splitlines() if ".sync" in line]
assert len(together) == 7 and all("convergent" in line for line in together), together

for wrong in (lambda a: bool(a < 3), lambda a: a + 1.5, lambda a: a / 2):
    try:
        on_cpu(wrong, [I32], I32)
    except TypeError:
        continue
    raise AssertionError("no TypeError")
print("right")
'''


def test_traced_code_computes_what_python_does() -> None:
    assert processes.run(CODE, timeout=120, NUMBA_ENABLE_CUDASIM="0").strip() == "right"
