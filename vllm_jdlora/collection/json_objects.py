"""Dataclasses out of parsed JSON, and back: every field is there, of its type, and there are no others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import starmap
from operator import attrgetter, itemgetter
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.json_file import short

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
}


def objects_of(kind: Any, items: list[Any], where: str) -> tuple[Any, ...]:
    """One of `kind` for each item. Items that are as they should be are told by columns, not one by one."""
    fields = kind.__dataclass_fields__
    if all(type(item) is dict for item in items) and all(set(k) == set(fields) for k in set(map(tuple, items))):
        found = ((_allowed(field), set(map(type, map(itemgetter(name), items)))) for name, field in fields.items())
        if all(types.issubset(allowed) for allowed, types in found):
            return tuple(starmap(kind, map(itemgetter(*fields), items)))
    return tuple(object_of(kind, item, where) for item in items)


def object_of(kind: Any, raw: Any, where: str) -> Any:
    """One of `kind`, whose fields and their types are those of the dataclass.

    Raises:
        JDLoRAError: with ``where`` in front.
    """
    if not isinstance(raw, dict):
        raise JDLoRAError(f"{where} must hold JSON objects")
    fields = kind.__dataclass_fields__
    if unknown := sorted(set(raw) - set(fields)):
        raise JDLoRAError(f"{where} does not know {', '.join(map(short, unknown[:5]))}")
    for name, field in fields.items():
        if name not in raw:
            if field.default is field.default_factory:  # both of them MISSING
                raise JDLoRAError(f"{where} lacks {name!r}")
            continue
        expected = _allowed(field)
        value = raw[name]
        if expected and (not isinstance(value, expected) or isinstance(value, bool)):
            raise JDLoRAError(f"{where}: {name} is {short(value)}")
    try:
        return kind(**raw)
    except (TypeError, AttributeError, OverflowError) as error:
        raise JDLoRAError(f"{where} is incomplete or of the wrong types ({error})") from error


def _allowed(field: Any) -> tuple[type, ...]:
    """The types that JSON may give for a field; none where it is built of others."""
    return _TYPES.get(getattr(field.type, "__name__", field.type), ())


def as_json(kind: Any, objects: Iterable[Any]) -> list[dict[str, Any]]:
    """JSON objects of dataclasses of `kind` whose fields are plain values."""
    names = tuple(kind.__dataclass_fields__)
    return [dict(zip(names, values, strict=True)) for values in map(attrgetter(*names), objects)]
