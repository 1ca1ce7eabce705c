"""A parser for untrusted YAML: plain data, with bounds on size, depth and numbers."""

import math
import re
from typing import Any

import yaml

from llm2slm_export.files.validation_problems import shortened

MOST_DEPTH = 32
MOST_CHARACTERS = 1_000_000
# PyYAML's resolvers that are replaced: they accept base-60 numbers and dates.
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_INTEGER = re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|[1-9][0-9_]*|0)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, base-60 numbers and duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node.

        Raises:
            RecursionError: the node is nested too deep. Raised early, because parsing time grows with the square of the
                length.
        """
        if self._depth > MOST_DEPTH:
            raise RecursionError
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping.

        Raises:
            ConstructorError: a key is given twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain data.

    Raises:
        ValueError: the text is not YAML, or not plain data within the bounds. The message is one line.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; the maximum is {MOST_CHARACTERS}")
    try:
        value = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError(f"it nests deeper than {MOST_DEPTH} levels") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # A tag such as !!int on other text: PyYAML passes on any exception of its conversion.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a value does not fit its tag, or is too long ({type(error).__name__})") from error
    require_plain(value)
    return value


def require_plain(value: Any) -> None:
    """Require text, None, a finite number of 64 bits, or lists and mappings of these.

    Raises:
        ValueError: the value is none of them, or nests too deep. The message is one line.
    """
    _require_plain(value, (), set())


def _require_plain(value: Any, above: tuple[int, ...], done: set[int]) -> None:
    """See `require_plain`. `above`: the containers around the value, by id; `done`: those that were checked."""
    if isinstance(value, dict | list):
        if id(value) in above:
            raise ValueError("an anchor holds itself")
        if len(above) >= MOST_DEPTH:
            raise ValueError(f"it nests deeper than {MOST_DEPTH} levels")
        if id(value) in done:
            return
        if isinstance(value, dict) and (odd := [key for key in value if not isinstance(key, str)]):
            raise ValueError(f"a key is not text: {shortened(odd[0])}")
        for child in (*value, *value.values()) if isinstance(value, dict) else value:
            _require_plain(child, (*above, id(value)), done)
        done.add(id(value))
    elif isinstance(value, str):
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"a text holds a NUL or a lone surrogate: {shortened(value)}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a number is not finite: {value}")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("a number is beyond 64 bits")
    elif value is not None:
        raise ValueError(f"a {type(value).__name__} is neither text nor a number: {shortened(value)}")
