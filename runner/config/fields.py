"""Fields of dataclasses as command-line options and in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from types import NoneType
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin, get_type_hints

from runner.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@dataclass(frozen=True)
class OptionDetails:
    """How a field is given on a command line.

    Attributes:
        help: shown by ``--help``.
        group: the group of options that commands take together.
        flag: the option's name; if empty, the field's name with dashes.
        metavar: the name of the value in ``--help``.
        unit: unit of a number: ``SECONDS``, ``GIB`` (the field holds bytes) or ``X`` (a factor).
        least: smallest whole number allowed.
        choices: texts allowed; empty allows any.
        listed: whether the option takes comma-separated values and may be repeated.
        hidden: whether ``--help`` leaves it out.
        required: whether the option must be given; the default then only sets its type.
    """

    help: str
    group: str = ""
    flag: str = ""
    metavar: str = ""
    unit: str = ""
    least: int | None = None
    choices: tuple[str, ...] = ()
    listed: bool = False
    hidden: bool = False
    required: bool = False


def option(default: T, details: OptionDetails) -> T:
    """Declare a dataclass field that ``runner.options`` turns into a command-line option."""
    return field(default=default, metadata={"option": details})


def to_plain(value: object) -> object:
    """JSON data of a value: enums by value (integers by lower-case name), tuples as lists."""
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    to_json: Callable[[], object] | None = getattr(value, "to_json", None)
    return value if to_json is None else to_json()


def from_plain(kind: object, value: object, *, zero: bool = False) -> object:
    """Convert :func:`to_plain`'s data back to a value of a type.

    Whole numbers start at 1 and others must be above 0; with ``zero`` both may be 0.

    Raises:
        ValueError: other data; the message continues the words "its 'name' is".
    """
    if value is None and NoneType in get_args(kind):
        return None
    kind = without_none(kind)
    if get_origin(kind) in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"{_short(value)}, not a list")
        items = [from_plain(get_args(kind)[0], item, zero=zero) for item in value]
        return items if get_origin(kind) is list else tuple(items)
    assert isinstance(kind, type)
    if issubclass(kind, Enum):
        return _member(kind, value)
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if kind in (int, float) and type(value) in (int, kind):
        assert isinstance(value, int | float)
        if 0 < value < _TOO_LARGE or (zero and value == 0):
            return kind(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{_short(value)}, not {_EXPECTED[kind, zero and kind in (int, float)]}")


def read_plain(
    kind: object, name: str, data: Mapping[str, object], *, zero: bool = False
) -> object:
    """Read the value of a type under a name; see :func:`from_plain`.

    Raises:
        KeyError: the name is missing.
        ValueError: the value is malformed.
    """
    try:
        return from_plain(kind, data[name], zero=zero)
    except ValueError as error:
        raise ValueError(f"its {name!r} is {error}") from None


def read_text(name: str, data: Mapping[str, object]) -> str:
    """:func:`read_plain` for text."""
    return str(read_plain(str, name, data))


def read_count(name: str, data: Mapping[str, object]) -> int:
    """:func:`read_plain` for a whole number from 1 on."""
    count = read_plain(int, name, data)
    assert isinstance(count, int)
    return count


_TOO_LARGE = 1e300

_EXPECTED: dict[tuple[type, bool], str] = {
    (int, False): "a whole number from 1 on",
    (int, True): "a whole number from 0 on",
    (float, False): "a number above 0",
    (float, True): "a number from 0 on",
    (bool, False): "true or false",
    (str, False): "a word",
}


def _member(kind: type[Enum], value: object) -> Enum:
    for member in kind:
        if to_plain(member) == value:
            return member
    raise ValueError(f"{_short(value)}, not one of {', '.join(str(to_plain(m)) for m in kind)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_tuples(record: DataclassInstance) -> None:
    """Raise UserError if a field of type tuple holds something else, such as a list."""
    for item in fields(record):
        value = getattr(record, item.name)
        if str(item.type).startswith("tuple[") and not isinstance(value, tuple | NoneType):
            raise UserError(f"{item.name}={_short(value)} must be a tuple")


def without_none(kind: object) -> object:
    """The type without its ``None`` option, if it has one."""
    args = get_args(kind)
    return next(each for each in args if each is not NoneType) if NoneType in args else kind


def field_types(cls: type) -> dict[str, object]:
    """Types of a dataclass's fields by name."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}
