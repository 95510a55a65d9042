"""Python, numpy and JAX values as strict JSON, and files that are written whole or not at all."""

import dataclasses
import enum
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def null(number: float) -> None:
    """The JSON value that stands for a number JSON cannot write: null, in measurements."""
    return None


def plain(value: Any, name: str = "value", non_finite: Callable[[float], Any] = null) -> Any:
    """Turns a value into what JSON can hold.

    Args:
        value: None, bool, int, float, str, an enum member (its name), a path, a numpy or JAX scalar or array, a
            dataclass, or a mapping, list, tuple or set of these.
        name: what the value is called in an error.
        non_finite: what is written for NaN and infinities, for which strict JSON has no number; null by default.

    Returns:
        Dicts with string keys, lists, strings, finite numbers, booleans and None.

    Raises:
        ValueError: a value of another kind; the sentence names it by its path, such as `config.policy.activation`.

    Example:
        >>> import numpy as np
        >>> plain({"loss": np.float32(0.5), "kl": float("nan"), "steps": (1, 2)})
        {'loss': 0.5, 'kl': None, 'steps': [1, 2]}
    """
    match value:
        case enum.Enum():
            return value.name
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else non_finite(float(value))
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {str(key): plain(item, f"{name}.{key}", non_finite) for key, item in value.items()}
        case list() | tuple():
            return [plain(item, f"{name}[{index}]", non_finite) for index, item in enumerate(value)]
        case set() | frozenset():
            return [plain(item, name, non_finite) for item in sorted(value, key=repr)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return {field: plain(getattr(value, field), f"{name}.{field}", non_finite) for field in fields}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return plain(value.tolist(), name, non_finite)
    raise ValueError(
        f"{name} is a {type(value).__name__}, which JSON cannot hold: use numbers, strings, lists or dataclasses"
    )


def write_json(path: Path, value: Any) -> Path:
    """Writes a value of `plain` kinds as indented JSON; a reader sees the old file or the new one, never half of one.

    Returns:
        The path.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
