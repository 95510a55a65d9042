"""The command line of an experiment: a frozen dataclass becomes options, and named presets become their defaults."""

import inspect
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_jax.parallel.distributed import leave, process_count
from rlhf_jax.training.compilation import keep_programs
from rlhf_jax.training.run_folder import failed_checks

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], description: str, arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for: a preset, changed by the other options.

    Args:
        presets: complete configurations by name, all of one dataclass with a field `preset`; the first is the default.
        description: what the script does, for `--help`.
        arguments: the words after the script's name.

    Raises:
        ValueError: an unknown preset.
        SystemExit: an unknown option or a value of the wrong type (with a message), or `--help`.
    """
    import tyro

    name = next(iter(presets))
    for place, word in enumerate(arguments):
        if word == "--preset" and place + 1 < len(arguments):
            name = arguments[place + 1]
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    if name not in presets:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(presets)}.")
    default = presets[name]
    return tyro.cli(type(default), default=default, description=description, args=list(arguments))


def run(main: Callable[[Any], dict], presets: Mapping[str, Any], description: str) -> None:
    """Runs `main(config)` from the command line; a mistake of the user's ends in one sentence, not in a traceback.

    Compiled programs are kept on disk for the next run, see `compilation.keep_programs`.

    Exits with 2 on bad input or a full disk, with 130 on Ctrl-C, and with 1 on a failed check when the configuration
    has `strict` set. A process of several that fails does not wait for the others, see `distributed.leave`.
    """
    try:
        config = parse(presets, description, sys.argv[1:])
        keep_programs()
        result = main(config)
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        if isinstance(error, ValueError | OSError) and _raised_by_us(error, main):
            print(f"error: {error}", file=sys.stderr)
            leave(2)
        if process_count() == 1:
            raise
        traceback.print_exc()
        leave(1)
    if getattr(config, "strict", False) and failed_checks(result):
        raise SystemExit(1)


def started(as_command: bool) -> float:
    """When the work began, on the clock of `time.monotonic`, in seconds.

    Args:
        as_command: the script was run as a command: then the start of the process, imports included; else now.
    """
    now = time.monotonic()
    if not as_command:
        return now
    import psutil

    return now - (time.time() - psutil.Process().create_time())


def _raised_by_us(error: Exception, main: Callable[..., Any]) -> bool:
    """Whether the error was raised in this package or in the experiment's file, and so speaks to the user."""
    step = error.__traceback__
    while step.tb_next is not None:
        step = step.tb_next
    file = Path(step.tb_frame.f_code.co_filename).resolve()
    return (
        Path(__file__).resolve().parents[1] in file.parents
        or file == Path(inspect.getfile(inspect.unwrap(main))).resolve()
    )
