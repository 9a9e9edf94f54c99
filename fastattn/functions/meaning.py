"""What the words of one function mean while it is compiled."""

from functools import cache

from fastattn.functions.captured import item_at
from fastattn.functions.operations import Operations

__all__ = ["Meaning"]


class Meaning:
    """What the words of one function mean, where calls compute in one dtype.

    `chosen` is an array that the function is differentiated by, and `place` which of the places where something is
    indexed, in the order in which they are compiled, is looked at.
    """

    def __init__(self, function, real, chosen=None, place=-1):
        self.function = function
        self.real = real
        self.chosen, self.place = chosen, place
        self.operations = operations_of(real)
        self._places = {}

    def item(self, python, statement):
        """What indexes a captured array, at this place in a function."""
        number = self._places.setdefault((python, statement.target.name), len(self._places))
        return item_at(self.real, number == self.place)


@cache
def operations_of(real):
    """The operations of calls that compute in one dtype."""
    return Operations(real)
