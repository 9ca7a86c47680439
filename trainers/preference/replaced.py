"""Settings of the losses of pairs that would do nothing, and are refused."""

from dataclasses import fields
from typing import Any

from ...core.configuration import field_default, refuse_label_smoothing_factor
from ...losses.preference.pair_losses import PAIR_LOSS_INPUTS

# Settings of TRL's, with the inputs of a loss of which at least one depends on them
_READ_THROUGH = {
    "label_smoothing": {"label_smoothing"},
    "discopop_tau": {"discopop_tau"},
    "f_divergence_type": {"margin", "chosen_scores"},
}

# Settings that act on TRL's pair losses, with the values under which they do nothing beside them
_OF_PAIRS = {
    "loss_type": ["sigmoid"],
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "precompute_ref_log_probs": False,
}


def refuse_settings_of_pair_losses(args: Any, field: str, off: Any) -> None:
    """
    Check that nothing is set that would act on the pair losses only.

    Args:
        args (config):
            Of the method.
        field (`str`), off (`Any`):
            Its field that says that it replaces the losses, and the value under which it does not.

    Raises:
        `ValueError`: naming the setting and what to do.
    """
    if getattr(args, field) == off:
        return
    for name, value in _OF_PAIRS.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"`{field}={getattr(args, field)!r}` replaces the losses of pairs and needs `{name}={value!r}`, got "
                f"{getattr(args, name)!r}. Set it so, or `{field}={off!r}`."
            )


def refuse_unread_settings(args: Any) -> None:
    """
    Check that each setting of TRL's losses is read by one of those in `loss_type`; TRL ignores it otherwise.

    Raises:
        `ValueError`: naming the setting, and the losses that read it.
    """
    refuse_label_smoothing_factor(args, "set `label_smoothing` with a `loss_type` that reads it")
    defaults = {f.name: field_default(f) for f in fields(args)}
    for name, inputs in _READ_THROUGH.items():
        readers = [loss for loss, needs in PAIR_LOSS_INPUTS.items() if inputs & set(needs)]
        value = getattr(args, name)
        if value != defaults[name] and not set(readers) & set(args.loss_type):
            raise ValueError(
                f"`{name}={value!r}` acts with one of the `loss_type`s {readers} only, got {args.loss_type}. Choose "
                f"one of these, or set `{name}={defaults[name]!r}`."
            )
    if args.f_alpha_divergence_coef != defaults["f_alpha_divergence_coef"] and (
        args.f_divergence_type != "alpha_divergence"
    ):
        raise ValueError(
            f"`f_alpha_divergence_coef={args.f_alpha_divergence_coef}` acts with `f_divergence_type="
            f"'alpha_divergence'` only, got {args.f_divergence_type!r}. Set one of the two."
        )
