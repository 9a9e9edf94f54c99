"""Values that are known while a kernel is compiled, as Numba types: a function is compiled for each that it is given.

Such a value is of a frozen dataclass. Its attributes that are whole numbers are constants, those that are static values
themselves can be passed on. Words, and tuples of them, are there for branches alone: what they decide is decided before
Numba types anything (`fastattn.simd.compiler`).
"""

from numba.core import types
from numba.core.imputils import lower_constant, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import models, register_model, typeof_impl

from fastattn.machine.kernel import Kernel
from fastattn.machine.table import Isa
from fastattn.machine.tile import TileShape

_classes: set[type] = set()
_numbers: dict[object, int] = {}


class StaticType(types.Dummy):
    """Numba's view of one static value; carries no run-time data.

    Its name has the number of the value, and not its attributes: names of types become a part of names of functions.
    """

    def __init__(self, value):
        self.value = value
        super().__init__(f"{type(value).__name__}{_numbers.setdefault(value, len(_numbers))}")


def register(kind):
    """Make the values of a frozen dataclass static."""
    _classes.add(kind)
    typeof_impl.register(kind)(lambda value, context: StaticType(value))


def is_static(value):
    """Whether a value is static."""
    return type(value) in _classes


@register_model(StaticType)
class _StaticModel(models.OpaqueModel):
    pass


@lower_constant(StaticType)
def _constant(context, builder, ty, value):
    return context.get_dummy_value()


@infer_getattr
class _Attributes(AttributeTemplate):
    key = StaticType

    def generic_resolve(self, ty, name):
        value = getattr(ty.value, name, None)
        if is_static(value):
            return StaticType(value)
        return types.intp if isinstance(value, int) else None


@lower_getattr_generic(StaticType)
def _attribute(context, builder, ty, value, name):
    found = getattr(ty.value, name)
    return context.get_dummy_value() if is_static(found) else context.get_constant(types.intp, int(found))


for _kind in (TileShape, Isa, Kernel):
    register(_kind)
