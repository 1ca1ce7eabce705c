"""Which cases of a test run when: with the README's command, with CI's slow tests, or nightly."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def tiered(
    cases: Iterable[Any] | Mapping[str, Any], *, fast: Collection[Any] = (), slow: Collection[Any] = ()
) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: those of `fast` unmarked, those of `slow` marked slow, all others nightly.

    Args:
        cases: the values, or values by id. A value that is a tuple is a parameter set.
        fast, slow: ids if `cases` has ids, else values.
    """
    named = dict(cases) if isinstance(cases, Mapping) else {case: case for case in cases}
    unknown = {*fast, *slow} - named.keys()
    assert not unknown, f"no cases: {unknown}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=key if isinstance(key, str) else "-".join(map(str, key)) if isinstance(key, tuple) else None,
            marks=() if key in fast else pytest.mark.slow if key in slow else pytest.mark.nightly,
        )
        for key, case in named.items()
    ]
