"""Numbers that carry a slope: a user's function is differentiated by being run on these.

A dual number is a value and the derivative of it by one chosen thing; each operation (`fastattn.functions.operations`)
says what becomes of both (Griewank and Walther 2008, "Evaluating Derivatives", chapter 3).
"""

from numba.core import cgutils, types
from numba.core.imputils import lower_cast
from numba.core.typeconv import Conversion
from numba.extending import models, register_model

__all__ = ["DualType", "make_dual", "parts_of", "real_of", "value_as"]


class DualType(types.Type):
    """A real number of some dtype with its slope."""

    def __init__(self, real):
        self.real = real
        super().__init__(f"Dual({real})")

    def can_convert_from(self, typingctx, other):
        """Any number is one, of slope 0: a variable may be a dual number here, and a number there."""
        return Conversion.safe if isinstance(other, (types.Number, types.Boolean)) else None

    def unify(self, typingctx, other):
        """The same for what two branches return."""
        return self if isinstance(other, (types.Number, types.Boolean)) else None


@register_model(DualType)
class _DualModel(models.StructModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, [("value", fe_type.real), ("slope", fe_type.real)])


def make_dual(context, builder, ty, value, slope):
    """LLVM's value of a dual number."""
    dual = cgutils.create_struct_proxy(ty)(context, builder)
    dual.value, dual.slope = value, slope
    return dual._getvalue()


def parts_of(context, builder, ty, given):
    """The value and the slope of a dual number; of another number, itself and None."""
    if not isinstance(ty, DualType):
        return given, None
    dual = cgutils.create_struct_proxy(ty)(context, builder, given)
    return dual.value, dual.slope


def value_as(context, builder, ty, given, target):
    """The value of a number, dual or not, in another type."""
    value, _ = parts_of(context, builder, ty, given)
    return context.cast(builder, value, ty.real if isinstance(ty, DualType) else ty, target)


def real_of(dtype):
    """The Numba type of numbers of a dtype, by its name."""
    return types.float32 if dtype == "float32" else types.float64


@lower_cast(types.Number, DualType)
@lower_cast(types.Boolean, DualType)
def _from_number(context, builder, fromty, toty, given):
    value = context.cast(builder, given, fromty, toty.real)
    return make_dual(context, builder, toty, value, context.get_constant(toty.real, 0.0))
