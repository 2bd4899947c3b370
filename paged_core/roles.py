"""Role: what the core requires of an object from a plugin or a caller, with defaults for its optional members.

A role is a base class. An object must have its abstract methods. All other members are optional, and the base class has
their defaults. Our own classes inherit from their roles. Other classes need not: ``SomeRole.of(thing)`` has all
attributes of the thing, and the defaults for those that it lacks. This file knows the standard library only.
"""

from __future__ import annotations

import inspect
from abc import ABC
from typing import Any, TypeVar, cast

_R = TypeVar("_R", bound="Role")
_MISSING = object()


class Role(ABC):  # noqa: B024  subclasses have the abstract methods
    """Base of all roles."""

    @classmethod
    def of(cls: type[_R], given: Any) -> _R:
        """Return ``given``, if it inherits from this role; else a wrapper with all its attributes and this role's
        defaults."""
        return cast(_R, given if isinstance(given, (cls, _WithDefaults)) else _WithDefaults(given, cls))

    @classmethod
    def is_met_by(cls, given: Any) -> bool:
        """Return whether ``given`` has all required members."""
        return not cls.missing_in(given)

    @classmethod
    def missing_in(cls, given: Any) -> list[str]:
        """Return the names of required members that ``given`` lacks."""
        return sorted(name for name in cls.__abstractmethods__ if not hasattr(given, name))


class _WithDefaults:
    """All attributes of an object, and a role's defaults for those that the object lacks. It can't be called in the
    object's place."""

    def __init__(self, given: Any, role: type[Role]) -> None:
        self._given = given
        self._role = role

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that messages name the object's own class
        return type(self._given)

    def __getattr__(self, name: str) -> Any:
        given = object.__getattribute__(self, "_given")
        try:
            return getattr(given, name)
        except AttributeError:
            default = inspect.getattr_static(self._role, name, _MISSING)
            if default is _MISSING or name in self._role.__abstractmethods__:
                raise
        return default.__get__(self, type(self)) if hasattr(default, "__get__") else default

    def __repr__(self) -> str:
        return repr(self._given)
