"""What the words of one function mean while it is compiled."""

from functools import cache

from fastattn.functions.captured import item_at
from fastattn.functions.operations import Operations

__all__ = ["Meaning"]


class Meaning:
    """What the words of one function mean, where calls compute in one dtype.

    `chosen` are the names of arrays that are looked at, and `place` is where the function is differentiated by what is
    read of them: a function in Python, and the variable that what is read is put into. `reads` are the names and places
    where an element of a chosen array is read, in the order in which they are compiled.
    """

    def __init__(self, function, real, chosen=(), place=None):
        self.function = function
        self.real = real
        self.chosen, self.place = chosen, place
        self.operations = operations_of(real)
        self.reads = []

    def item(self, python, statement):
        """What indexes a captured array, at this place in a function."""
        place = (python, statement.target.name)

        def read(name):
            if (name, place) not in self.reads:
                self.reads.append((name, place))

        return item_at(self.real, place == self.place, read)


@cache
def operations_of(real):
    """The operations of calls that compute in one dtype."""
    return Operations(real)
