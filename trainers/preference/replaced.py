"""What a method refuses that replaces the losses of pairs."""

from typing import Any

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
