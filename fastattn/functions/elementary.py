"""Elementary functions of one number, without branches, so that LLVM makes vectors of them; each with its derivative.

They are right to some units in the last place. Polynomials are those of the kernels' exponential and tanh, which are
written for tiles (`fastattn.cpu.kernels.softmax`, `.tanh`). What is not among the functions here is the C library's,
one lane at a time.
"""

from llvmlite import ir

__all__ = ["FUNCTIONS", "Term", "choose"]

LOG2_E = 1.4426950408889634
# For each width: ln 2 in two parts, of which the first has so few digits that its products with exponents are exact;
# from where to where 2^x is a normal number; (2^f - 1) / f on [-1/2, 1/2], lowest power first; and how large 2x of a
# tanh(x) may become, squared.
EXPONENTIAL = {
    32: (
        (0.693359375, -2.12194440e-4),
        (-126.0, 127.0),
        (
            0.6931471880262288,
            0.24022650760568126,
            0.05550357114219078,
            0.009618082557277854,
            0.0013390863364671215,
            0.00015453162945119471,
        ),
        60.0,
    ),
    64: (
        (6.93147180369123816490e-01, 1.90821492927058770002e-10),
        (-1022.0, 1023.0),
        (
            0.6931471805599453,
            0.24022650695910097,
            0.05550410866482159,
            0.0096181291076069,
            0.0013333558146418052,
            0.00015403530441733052,
            1.5252733828614522e-05,
            1.321544258585974e-06,
            1.0178063026613412e-07,
            7.072586722911188e-09,
            4.454862599313504e-10,
        ),
        500.0,
    ),
}


class Term:
    """A floating number in the code that is being made: Python's operators add instructions to it."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    @property
    def bits(self):
        """The width of its dtype."""
        return 32 if isinstance(self.value.type, ir.FloatType) else 64

    def like(self, number):
        """Another one of this dtype."""
        if isinstance(number, Term):
            return number
        return Term(self.builder, ir.Constant(self.value.type, float(number)))

    def __add__(self, other):
        return Term(self.builder, self.builder.fadd(self.value, self.like(other).value))

    def __sub__(self, other):
        return Term(self.builder, self.builder.fsub(self.value, self.like(other).value))

    def __mul__(self, other):
        return Term(self.builder, self.builder.fmul(self.value, self.like(other).value))

    def __truediv__(self, other):
        return Term(self.builder, self.builder.fdiv(self.value, self.like(other).value))

    def __rsub__(self, other):
        return self.like(other) - self

    def __rtruediv__(self, other):
        return self.like(other) / self

    def __neg__(self):
        return Term(self.builder, self.builder.fneg(self.value))

    __radd__, __rmul__ = __add__, __mul__

    def compare(self, relation, other, unordered=False):
        """Whether they are in this relation; with NaN `unordered` is the answer."""
        compare = self.builder.fcmp_unordered if unordered else self.builder.fcmp_ordered
        return compare(relation, self.value, self.like(other).value)

    def call(self, name, *others):
        """An LLVM intrinsic, of which the C library may have the code."""
        given = [self.value, *(self.like(other).value for other in others)]
        fnty = ir.FunctionType(given[0].type, [each.type for each in given])
        callee = self.builder.module.declare_intrinsic(f"llvm.{name}", [given[0].type], fnty)
        return Term(self.builder, self.builder.call(callee, given))

    def is_nan(self):
        """Whether it is."""
        return self.builder.fcmp_unordered("uno", self.value, self.value)


def choose(condition, yes, no):
    """One of two terms; one of them may be a Python number."""
    like = yes if isinstance(yes, Term) else no
    return Term(like.builder, like.builder.select(condition, like.like(yes).value, like.like(no).value))


def _clipped(x, low, high):
    return choose(x.compare(">", high), high, choose(x.compare("<", low), low, x))


def _horner(x, coefficients):
    total = x.like(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _power_of_two(n):
    """2^n for a whole number n, of normal exponents."""
    builder, bits = n.builder, n.bits
    bias, shift = (127, 23) if bits == 32 else (1023, 52)
    word = ir.IntType(bits)
    exponent = builder.add(builder.fptosi(n.value, word), ir.Constant(word, bias))
    return Term(builder, builder.bitcast(builder.shl(exponent, ir.Constant(word, shift)), n.value.type))


def _exp_parts(x):
    """n and 2^f - 1 with e^x = 2^n · 2^f, f in [-1/2, 1/2]; x is not far from where e^x is finite and not 0."""
    (high, low), _, power, _ = EXPONENTIAL[x.bits]
    n = (x * LOG2_E).call("rint")
    f = ((x - n * high) - n * low) * LOG2_E
    return n, f * _horner(f, power)


def _scaled(x, n):
    """x · 2^n, in two steps, as 2^n need not be a normal number."""
    half = (n * 0.5).call("floor")
    return x * _power_of_two(half) * _power_of_two(n - half)


def exp(x):
    """e^x."""
    _, (least, most), _, _ = EXPONENTIAL[x.bits]
    n, part = _exp_parts(_clipped(x, 1.05 * least, 0.75 * most))
    value = _scaled(part + 1.0, n)
    value = choose(x.is_nan(), x, value)
    return value, value


def _exp2(x):
    _, (least, most), power, _ = EXPONENTIAL[x.bits]
    bounded = _clipped(x, 1.2 * least, 1.1 * most)
    n = bounded.call("rint")
    f = bounded - n
    value = choose(x.is_nan(), x, _scaled(f * _horner(f, power) + 1.0, n))
    return value, value * 0.6931471805599453


def tanh(x):
    """tanh(x) = (e^2x - 1) / (e^2x + 1), of which nothing is lost where x is small."""
    *_, farthest = EXPONENTIAL[x.bits]
    n, part = _exp_parts(_clipped(x * 2.0, -farthest, farthest))
    power = _power_of_two(n)
    less = power * part + (power - 1.0)
    inverse = 1.0 / (less + 2.0)
    value = choose(x.is_nan(), x, less * inverse)
    return value, (less + 1.0) * 4.0 * inverse * inverse


def sigmoid(x):
    """1 / (1 + e^-x)."""
    value = 1.0 / (exp(-x)[0] + 1.0)
    return value, value * (1.0 - value)


def _absolute(x):
    return x.call("fabs"), choose(x.compare("<", 0.0), -1.0, choose(x.compare(">", 0.0), x.like(1.0), 0.0))


def _sign(x):
    value = choose(x.compare("<", 0.0), -1.0, choose(x.compare(">", 0.0), x.like(1.0), x * 0.0))
    return value, x.like(0.0)


def _sqrt(x):
    value = x.call("sqrt")
    return value, 0.5 / value


def _square(x):
    return x * x, x * 2.0


def _relu(x):
    is_positive = x.compare(">", 0.0)
    return choose(x.is_nan(), x, choose(is_positive, x, 0.0)), choose(is_positive, x.like(1.0), 0.0)


def _step(name):
    """What is constant between its steps."""
    return lambda x: (x.call(name), x.like(0.0))


def _log1p(x):
    # Kahan's: log(1 + x) with what was lost of x in 1 + x made good.
    larger = x + 1.0
    value = choose(larger.compare("==", 1.0), x, larger.call("log") * (x / (larger - 1.0)))
    return choose(x.compare("==", float("inf")), x, value), 1.0 / larger


def _expm1(x):
    _, (least, most), _, _ = EXPONENTIAL[x.bits]
    n, part = _exp_parts(_clipped(x, 1.05 * least, 0.68 * most))
    power = _power_of_two(_clipped(n, least, most))
    value = power * part + (power - 1.0)
    value = choose(x.compare(">", 0.68 * most), exp(x)[0], value)
    return choose(x.is_nan(), x, value), exp(x)[0]


#: From its name to a function of a `Term`: the value and the derivative there.
FUNCTIONS = {
    "exp": exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "abs": _absolute,
    "sign": _sign,
    "sqrt": _sqrt,
    "square": _square,
    "relu": _relu,
    "log": lambda x: (x.call("log"), 1.0 / x),
    "log2": lambda x: (x.call("log2"), LOG2_E / x),
    "log10": lambda x: (x.call("log10"), 0.4342944819032518 / x),
    "log1p": _log1p,
    "sin": lambda x: (x.call("sin"), x.call("cos")),
    "cos": lambda x: (x.call("cos"), -x.call("sin")),
    "reciprocal": lambda x: (1.0 / x, -(1.0 / (x * x))),
    "floor": _step("floor"),
    "ceil": _step("ceil"),
    "trunc": _step("trunc"),
    "rint": _step("rint"),
}
