"""Role: what the core asks of an object that others bring, with a default for all that such an object may lack.

A role is a base class. Its abstract methods must be there; all else is optional, and the base class has what is done
without it. Our own classes inherit from their roles. A stranger's need not: ``SomeRole.of(thing)`` has all that the
thing has, and the defaults besides. This file knows the standard library only.
"""

from __future__ import annotations

import inspect
from abc import ABC
from typing import Any, TypeVar, cast

_R = TypeVar("_R", bound="Role")
_MISSING = object()


class Role(ABC):  # noqa: B024  roles have the abstract methods
    """Base of all roles."""

    @classmethod
    def of(cls: type[_R], given: Any) -> _R:
        """``given``, if it inherits from this role; else what stands for it in this role."""
        return cast(_R, given if isinstance(given, (cls, _WithDefaults)) else _WithDefaults(given, cls))

    @classmethod
    def is_met_by(cls, given: Any) -> bool:
        """Whether it has all that must be there."""
        return not cls.missing_in(given)

    @classmethod
    def missing_in(cls, given: Any) -> list[str]:
        """What must be there, and isn't."""
        return sorted(name for name in cls.__abstractmethods__ if not hasattr(given, name))


class _WithDefaults:
    """All attributes of an object, and of a role what the object lacks. It can't be called in the object's place."""

    def __init__(self, given: Any, role: type[Role]) -> None:
        self._given = given
        self._role = role

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for messages
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
