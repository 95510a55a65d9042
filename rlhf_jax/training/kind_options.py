"""Which kind of reward model pairs are to teach: the options, and what is refused among them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rlhf_jax.training.reward_folders import kind_in

ONE_HEAD = ("bradley_terry", "dropout", "posterior")
"""Kinds that are trained as one plain reward model is."""
ENSEMBLES = ("linear_ensemble", "lora_ensemble")
"""Kinds that have a head for each member."""
MEMBERS = 20
"""Heads or masks where nothing else is asked for."""
READ_BY: Mapping[str, tuple[str, ...]] = {
    "members": ("linear_ensemble", "dropout"),
    "prior_decay": ("linear_ensemble",),
    "bootstrap": ENSEMBLES,
    "geometry": ("posterior",),
    "regularisation": ("posterior",),
    "frozen": ("posterior",),
    "adapter": (*ONE_HEAD, "lora_ensemble"),
    "smoothing_rate": ONE_HEAD,
    "dropout": ONE_HEAD,
    "label_smoothing": (*ONE_HEAD, *ENSEMBLES),
    "centring": (*ONE_HEAD, *ENSEMBLES),
    "weight_decay": (*ONE_HEAD, "probabilistic"),
}
"""Options that not all kinds read, and the kinds that do."""
OF_STEPS = (
    *("steps", "epochs", "learning_rate", "weight_decay", "adapter"),
    *("smoothing_rate", "dropout", "label_smoothing", "centring"),
)
"""Options that nothing reads where no step is taken."""


@dataclasses.dataclass(frozen=True)
class KindOptions:
    """Which kind of reward model is trained, and the options of some kinds.

    Attributes:
        kind: one linear head, as `transformers` knows it ("bradley_terry"), or a model that knows how unsure it is:
            many linear heads on one trunk ("linear_ensemble"); an adapter and a head for each member
            ("lora_ensemble"), the second stage, whose --model is the folder of a linear ensemble; one head under masks
            of dropout ("dropout", with --dropout); one head and what its training pairs have taught it ("posterior");
            rewards with a mean and a standard deviation ("probabilistic", which measures what data leave open).
        members: heads of a linear ensemble, or masks of dropout; None: 20, or as many heads as --model has.
        prior_decay: of a linear ensemble: strength of the pull of every head towards its own start, which keeps heads
            apart where the pairs say nothing; with Adam, heads without it do not stay there.
        bootstrap: of an ensemble: each member weighs the pairs by a bootstrap draw of its own.
        geometry: of a posterior: the curvature of the loss ("fisher"), or the second moment of the features of all
            responses ("responses", as AdvPO has it) or of the differences of pairs ("pairs").
        regularisation: lambda of that geometry, in squared units of the features: for "fisher" the precision of the
            head's prior.
        frozen: for a posterior: --model is a finished reward model, which stays as it is; no step is taken, and --data
            are the pairs that it was trained on.
    """

    kind: Literal["bradley_terry", "linear_ensemble", "lora_ensemble", "dropout", "posterior", "probabilistic"] = (
        "bradley_terry"
    )
    members: int | None = None
    prior_decay: float = 0.0
    bootstrap: bool = False
    geometry: Literal["fisher", "responses", "pairs"] = "fisher"
    regularisation: float = 1.0
    frozen: bool = False


def check_kind(options: Any) -> None:
    """Refuses options that the kind cannot work with or does not read; reads no parameters.

    Args:
        options: `KindOptions` and `TrainingOptions` in one, with those of reward modelling.

    Raises:
        ValueError: the sentence names the option.
    """
    kind, given = options.kind, vars(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    if kind in ENSEMBLES and options.weight_decay:
        raise ValueError(
            "--weight-decay would pull all heads of an ensemble to 0, where they agree: leave it out (--prior-decay "
            "pulls each head of a linear ensemble to its own start)."
        )
    for name, kinds in READ_BY.items():
        if kind not in kinds and given[name] != defaults[name]:
            raise ValueError(
                f"--kind {kind} does not use --{name.replace('_', '-')}: leave it out, or choose {' or '.join(kinds)}."
            )
    for name in OF_STEPS if options.frozen else ():
        if given[name] != defaults[name]:
            raise ValueError(
                f"--frozen takes no step, so nothing reads --{name.replace('_', '-')}: leave one of them out."
            )
    if options.members is not None and options.members < 2:
        raise ValueError(f"--members is {options.members}: one member never disagrees; give 2 or more.")
    if not options.prior_decay >= 0:
        raise ValueError(f"--prior-decay is {options.prior_decay}: give 0 or more.")
    if not options.regularisation > 0:
        raise ValueError(f"--regularisation is {options.regularisation}: give more than 0.")
    if kind == "dropout" and not options.dropout:
        raise ValueError("--kind dropout needs --dropout, the share of features that are left out: give 0.1, say.")
    if kind == "lora_ensemble":
        if options.adapter is None:
            raise ValueError("--kind lora_ensemble trains an adapter a member: give --adapter lora, say.")
        if kind_in(options.model) != "linear_ensemble":
            raise ValueError(
                f"--kind lora_ensemble begins with the trunk and the heads of a linear ensemble, and --model "
                f"{options.model} is none: train one first, with --kind linear_ensemble and other pairs."
            )
