"""How many programs JAX compiled, and how long that took."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileClock:
    """Counts compilations from its creation on, process-wide; programs read from the persistent cache count too.

    Attributes:
        programs: number of programs compiled.
        seconds: time spent on it, in seconds; tracing is not included.

    Example:
        >>> import jax.numpy as jnp
        >>> clock = CompileClock()
        >>> _ = jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
        >>> clock.programs > 0 and clock.seconds > 0
        True
    """

    def __init__(self):
        self.programs = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: str | int) -> None:
        if event == _EVENT:
            self.programs += 1
            self.seconds += duration
