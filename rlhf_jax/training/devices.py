"""Where a script runs: one device, a mesh over all devices of a host, or one over those of several processes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel.distributed import initialise, printing_first, process_count
from rlhf_jax.parallel.mesh import MeshShape, check_batch, make_mesh, parse_mesh
from rlhf_jax.parallel.sharding import initialised, place_batch
from rlhf_jax.training.options import SourceOptions, TrainingOptions


def on_devices(main: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """`main(config)` under the mesh that `--mesh` asks for, in as many processes as take part.

    Processes are connected before `main` begins; what is printed comes from the first of them.
    """

    @functools.wraps(main)
    def run(config: SourceOptions) -> dict:
        shape, between = mesh_shapes(config)
        initialise(config)
        with printing_first():
            mesh = mesh_of(shape, between)
            if mesh is None:
                check_without_mesh(config)
                return main(config)
            with jax.set_mesh(mesh):
                return main(config)

    return run


def mesh_shapes(options: SourceOptions) -> tuple[MeshShape | None, MeshShape | None]:
    """The shapes that `--mesh` and `--mesh-between` ask for.

    Raises:
        ValueError: one is not understood, or there is a second without a first.
    """
    if options.mesh is None and options.mesh_between is not None:
        raise ValueError("--mesh-between repeats the mesh of one slice: give --mesh as well.")
    shapes = [None if words is None else parse_mesh(words) for words in (options.mesh, options.mesh_between)]
    return shapes[0], shapes[1]


def mesh_of(shape: MeshShape | None, between: MeshShape | None = None) -> Mesh | None:
    """The mesh over all devices; None for a run on one.

    Without a shape a run of one process uses one device, and a run of several splits the rows of its batches over all.
    """
    if shape is None and process_count() == 1:
        idle = len(jax.devices()) - 1
        if idle and jax.default_backend() != "cpu":
            print(f"{idle} of {idle + 1} devices are not used: give --mesh, such as data={idle + 1}", flush=True)
        return None
    return make_mesh(shape or MeshShape(data=len(jax.devices())), between=between)


def check_without_mesh(options: SourceOptions) -> None:
    """Refuses options that a run on one device would pass over.

    Raises:
        ValueError: the sentence names the option.
    """
    for name, value in vars(options).items():
        if value and name in ("split_optimizer", "offload_reference"):
            raise ValueError(f"--{name.replace('_', '-')} is for a run on a mesh: give --mesh as well.")


def current_mesh() -> Mesh | None:
    """The mesh that is set; None where there is none."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def layout(options: TrainingOptions, offload_reference: bool = False) -> dict[str, Any]:
    """How `start` is to lay out a state, as the options say; those of scripts that offload a reference say so too."""
    return {"split_optimizer": options.split_optimizer, "offload": ("reference",) if offload_reference else ()}


def start(
    init: Callable[..., Any],
    configs: Sequence[ModelConfig],
    *arguments: Any,
    split_optimizer: bool = False,
    offload: Sequence[str] = (),
) -> Any:
    """`init(*arguments)`: the first state of a run; on a mesh each part is made where it is to lie.

    On a mesh the arguments are used up: the state takes over their memory.

    Args:
        init: makes the state.
        configs: shapes of the models in it.
        *arguments: keys and parameters; no array twice.
        split_optimizer: see `parallel.sharding.infer`.
        offload: see `parallel.sharding.infer`.
    """
    mesh = current_mesh()
    if mesh is None:
        return init(*arguments)
    return initialised(init, mesh, configs, *arguments, split_optimizer=split_optimizer, offload=offload)


def check_rows(rows: int | None, tokens: int | None, what: str = "rows of a batch") -> None:
    """Refuses a batch that does not divide over the mesh that is set; see `parallel.mesh.check_batch`."""
    mesh = current_mesh()
    if mesh is not None:
        check_batch(rows, tokens, mesh.shape, what)


def placing(collate: Callable[..., Any]) -> Callable[..., Any]:
    """The same collate, whose batches lie split over the mesh that is set now; as it is where there is none."""
    mesh = current_mesh()
    if mesh is None:
        return collate

    return lambda items: place_batch(collate(items), mesh)
