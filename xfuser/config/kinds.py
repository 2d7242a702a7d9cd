"""The types of options, checked where code sets them; the command line converts its own."""

import os
import types
import typing
from dataclasses import fields
from numbers import Integral
from typing import Any

import numpy as np

KINDS = {  # annotations of fields: what they accept, and its name in errors; of others, the value is not checked
    bool: ((Integral, np.bool_), "True or False"),
    int: (Integral, "a whole number"),
    float: (typing.SupportsFloat, "a number"),
    str: ((str, os.PathLike), "a text"),
    list[int]: ((list, tuple), "a list of whole numbers"),
    list[str]: ((list, tuple), "a list of texts"),
    type(None): (type(None), "None"),
}


def check_types(options: Any) -> None:
    """Raise a ValueError unless each field of a dataclass has a value of its annotated type. A bool is no number.

    Fields that are just texts, or texts and numbers, are left to the checks of their known values.
    """
    for name, hint in ((spec.name, spec.type) for spec in fields(options)):
        value = getattr(options, name)
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if kinds == (str,) or {str, int} <= {*kinds} or not KINDS.keys() >= {*kinds}:
            continue
        fits = any(isinstance(value, KINDS[kind][0]) for kind in kinds)
        if not fits or (value not in (0, 1) if bool in kinds else isinstance(value, bool)):
            raise ValueError(f"{name}={value!r} must be {' or '.join(KINDS[kind][1] for kind in kinds)}")
