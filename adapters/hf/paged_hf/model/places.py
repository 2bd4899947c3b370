"""Places: containers that a forward reads, and whether they still hold the same objects. Contents are compared by
identity, all places of a kind in one loop that runs in C, about ten microseconds for a small model. Only if identities
differ are values compared, because assigning an equal number changes nothing.

This file knows containers and functions. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import chain
from operator import attrgetter, is_, itemgetter, methodcaller
from types import CellType, FunctionType, NoneType
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.Size)

Matters = Callable[[Any, Any], bool]
"""``matters(key, value)``: whether an entry of a mapping is to be compared."""


class Places:
    """Add places; then ``changed`` names one that has changed, as often as you call it."""

    def __init__(self) -> None:
        self._types = _Types(type)
        self._empty = _Empty(_itself)
        self._mappings = _Group(methodcaller("values"))
        self._sequences = _Group(_itself)
        self._functions = _Group(attrgetter("__code__", "__defaults__", "__kwdefaults__"))
        self._cells = _Group(attrgetter("cell_contents", "cell_contents"))
        self._rest = _Group(methodcaller("__call__"))
        self._groups = [
            self._types,
            self._empty,
            self._mappings,
            self._sequences,
            self._functions,
            self._cells,
            self._rest,
        ]
        self._by_names: dict[tuple[str, ...], _Group] = {}

    def add_type(self, thing: Any, name: str) -> None:
        """Watch the class of an object, because ``__class__`` may be assigned."""
        self._types.add(_Place(thing, name, _class_of))

    def add_mapping(self, mapping: Mapping[Any, Any], name: str, matters: Matters | None = None) -> None:
        (self._mappings if mapping else self._empty).add(_Entries(mapping, name, matters))

    def add_attributes(self, own: dict[str, Any], name: str, matters: Matters) -> None:
        """Watch a few entries of a mapping, the same few for many mappings."""
        names = tuple(key for key, value in own.items() if matters(key, value))
        if names not in self._by_names:
            self._by_names[names] = _Group(itemgetter(names[0], *names) if names else _nothing, partly=True)
            self._groups.append(self._by_names[names])
        self._by_names[names].add(_Entries(own, name, matters))

    def add_sequence(self, values: Collection[Any], name: str) -> None:
        """Of a mapping, the keys."""
        self._sequences.add(_Place(values, name, _itself))

    def add_function(self, function: FunctionType, name: str) -> None:
        self._functions.add(_Place(function, name, self._functions.read))

    def add_cell(self, cell: CellType, name: str) -> None:
        """A variable of a closure, which has a value."""
        self._cells.add(_Place(cell, name, self._cells.read))

    def add_values(self, read: Callable[[], tuple[Any, ...]], name: str) -> None:
        """What ``read()`` returns. If it raises, that is a change."""
        self._rest.add(_Place(read, name, self._rest.read))

    def changed(self) -> str | None:
        """The name of a place whose content has changed."""
        for group in self._groups:
            if not group.same() and (name := group.difference()) is not None:
                return name
        for place in self._empty.filled():
            self._mappings.add(place)
        return None

    def settle(self) -> bool:
        """Compare no longer what is another now. Whether there is any such place."""
        return sum(group.settle() for group in self._groups) > 0  # of all groups: any() would stop


class _Place:
    """``read(thing)`` gives some values."""

    def __init__(self, thing: Any, name: str, read: Callable[[Any], Any]) -> None:
        self.thing, self.name, self.read = thing, name, read
        self.known = self.facts()

    def facts(self) -> dict[Any, Any]:
        return dict(enumerate(self.read(self.thing)))

    def differs(self) -> bool:
        """Whether a content differs. If not, the present contents are remembered."""
        try:
            now = self.facts()
        except Exception:  # it is gone, or its size is changing right now
            return True
        if now.keys() != self.known.keys() or not all(equal(value, self.known[key]) for key, value in now.items()):
            return True
        self.known = now
        return False

    def leave_out(self) -> bool:
        """Stop comparing what differs. Whether anything is left to compare."""
        return False


class _Entries(_Place):
    """Entries of a mapping."""

    def __init__(self, mapping: Mapping[Any, Any], name: str, matters: Matters | None) -> None:
        self._matters = matters
        self._left_out: set[Any] = set()
        self._grows = False  # whether new entries are left out
        super().__init__(mapping, name, _nothing)

    def facts(self) -> dict[Any, Any]:
        entries = list(self.thing.items())
        if self._matters is not None:
            entries = [(key, value) for key, value in entries if self._matters(key, value)]
        if self._left_out or self._grows:
            entries = [
                (key, value)
                for key, value in entries
                if key not in self._left_out and (key in self.known or not self._grows)
            ]
        return dict(entries)

    def leave_out(self) -> bool:
        now = self.facts()
        self._grows |= not now.keys() <= self.known.keys()
        self._left_out |= {key for key, value in self.known.items() if not equal(value, now.get(key, self))}
        self.known = self.facts()
        return True


class _Group:
    """Places that are read in the same way: ``read(thing)`` has a length and can be iterated. ``partly``: only a part
    of a thing is read, so its length is compared too."""

    def __init__(self, read: Callable[[Any], Any], partly: bool = False) -> None:
        self.read = read
        self._partly = partly
        self._places: list[_Place] = []
        self._things: list[Any] = []
        self._sizes: list[int] = []
        self._lengths: list[int] = []
        self._values: list[Any] = []  # of all things, concatenated

    def add(self, place: _Place) -> None:
        self._places.append(place)
        self._remember(place.thing)

    def same(self) -> bool:
        try:
            found = list(map(self.read, self._things))
            return (
                list(map(len, found)) == self._lengths
                and all(map(is_, chain.from_iterable(found), self._values))
                and (not self._partly or list(map(len, self._things)) == self._sizes)
            )
        except Exception:  # as above
            return False

    def difference(self) -> str | None:
        """Where a value differs. If none does, the present values are remembered."""
        for place in self._places:
            if place.differs():
                return place.name
        self._forget()
        return None

    def settle(self) -> bool:
        if self.same():
            return False
        different = [place for place in self._places if place.differs()]
        gone = {id(place) for place in different if not place.leave_out()}
        self._places = [place for place in self._places if id(place) not in gone]
        self._forget()
        return bool(different)

    def _forget(self) -> None:
        """Read all values again."""
        self._things, self._sizes, self._lengths, self._values = [], [], [], []
        for place in self._places:
            self._remember(place.thing)

    def _remember(self, thing: Any) -> None:
        values = list(self.read(thing))
        self._things.append(thing)
        self._sizes.append(len(thing) if self._partly else 0)
        self._lengths.append(len(values))
        self._values += values


class _Types(_Group):
    """One value each: the class."""

    def same(self) -> bool:
        return all(map(is_, map(type, self._things), self._values))

    def _remember(self, thing: Any) -> None:
        self._things.append(thing)
        self._values.append(type(thing))


class _Empty(_Group):
    """Mappings without entries. Most modules have some, so they are compared together."""

    def same(self) -> bool:
        return not any(self._things)

    def filled(self) -> list[_Place]:
        """Remove and return those that have entries now."""
        if self.same():
            return []
        filled = [place for place in self._places if place.thing]
        self._places = [place for place in self._places if not place.thing]
        self._forget()
        return filled


def equal(a: Any, b: Any) -> bool:
    """Whether ``a`` and ``b`` are the same for every reader."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) in _PLAIN and bool(a == b)


def is_plain(value: Any) -> bool:
    """Whether it refers to nothing else and can't change."""
    return type(value) in _PLAIN


def _class_of(thing: Any) -> tuple[type]:
    return (type(thing),)


def _itself(values: Any) -> Any:
    return values


def _nothing(thing: Any) -> tuple[()]:
    return ()
