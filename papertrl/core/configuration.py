"""Declarative fields for method configs: one place states a field's help, default and valid range."""

import copy
import dataclasses
import functools
import inspect
import warnings
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

from .ranges import Valid, check_ranges


class _Metadata(dict):
    """Field metadata whose `copy`, which is all that argument parsers read, holds only what `argparse` knows."""

    def copy(self) -> dict:
        return {"help": self["help"].replace("%", "%%")}


def method_field(default: Any, help: str, was: str | None = None, **valid: Any) -> Any:
    """
    Dataclass field of a method's config.

    Args:
        default (`Any`):
            Default value; a list becomes a default factory.
        help (`str`):
            The field's only description: shown by `--help` and in the config's docstring.
        was (`str`, *optional*):
            Earlier name of the field, which is still taken, with a warning.
        **valid:
            Bounds or choices, see [`Valid`]. `None` is accepted where the annotation has it.
    """
    metadata = _Metadata(help=help)
    if was is not None:
        metadata["was"] = was
    if valid:
        valid.setdefault("optional", default is None)
        metadata["valid"] = Valid(**valid)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def method_config(cls: type) -> type:
    """Class decorator: `dataclass`, plus a `Parameters` section in the docstring made from the fields' help."""
    for name, annotation in inspect.get_annotations(cls).items():
        f = cls.__dict__.get(name)
        valid = getattr(f, "metadata", {}).get("valid")
        if valid is not None and "None" in str(annotation):
            # The annotation says so
            f.metadata = MappingProxyType(_Metadata(f.metadata, valid=replace(valid, optional=True)))
    cls = dataclass(cls)
    lines = []
    for f in own_fields(cls):
        valid = f.metadata.get("valid")
        default = field_default(f)
        lines.append(f"        {f.name} (`{_type_name(f.type)}`, *optional*, defaults to `{default!r}`):")
        lines.append(f"            {f.metadata['help']}" + (f" Valid: {valid}." if valid else ""))
    if lines:
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n    Parameters:\n" + "\n".join(lines) + "\n    "
    return _taking_earlier_names(cls)


@functools.lru_cache
def earlier_names(cls: type) -> dict[str, str]:
    """Earlier names of the fields of a config class, with the present ones."""
    return {f.metadata["was"]: f.name for f in fields(cls) if "was" in f.metadata}


def renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """
    `values` under the present names of fields, with a warning for each earlier one.

    Args:
        values (`dict`):
            By field name.
        names (`dict[str, str]`):
            From [`earlier_names`].

    Raises:
        `ValueError`: if a field is given under both names.
    """
    result = {}
    for name, value in values.items():
        present = names.get(name, name)
        if present in result or (present != name and present in values):
            raise ValueError(f"`{present}` is given twice: `{name}` is its earlier name. Drop the latter.")
        if present != name:
            warnings.warn(
                f"`{name}` is now called `{present}`; the old name goes with the next release.", stacklevel=3
            )
        result[present] = value
    return result


def _taking_earlier_names(cls: type) -> type:
    names = earlier_names(cls)
    if not names or cls.__init__.__dict__.get("taken") == names:
        return cls
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **renamed(kwargs, names))

    __init__.taken = names
    cls.__init__ = __init__
    return cls


def own_fields(cls: type) -> list[dataclasses.Field]:
    """Fields that `cls` itself introduces or overrides, in order of definition."""
    return [cls.__dataclass_fields__[name] for name in inspect.get_annotations(cls)]


def field_default(f: dataclasses.Field) -> Any:
    """Default value of a dataclass field, a fresh one where it has a factory."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _type_name(annotation: Any) -> str:
    return (
        annotation.__name__
        if isinstance(annotation, type) and not hasattr(annotation, "__args__")
        else str(annotation)
    )


class ConfigMixin:
    """
    Validation shared by every config of the library, of trainers and of components.

    A subclass states the accepted values of its fields with [`method_field`]; relations between fields go into an
    override of `validate` that calls `super().validate()`.

    Attributes:
        combined (`tuple` of config classes):
            Configs that a composed one was made of.
        differing_defaults (`dict`):
            Fields for which these have different defaults, with the default of each by its name.
    """

    combined: ClassVar[tuple[type, ...]] = ()
    differing_defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self):
        # Before anything is computed from the values
        check_ranges(self)
        for base in type(self).__mro__[type(self).__mro__.index(ConfigMixin) + 1 :]:
            if "__post_init__" in base.__dict__:
                base.__post_init__(self)
                break
        self.validate()

    def __getattr__(self, name: str) -> Any:
        # Only reached where there is no attribute of this name
        if not name.startswith("_") and (present := earlier_names(type(self)).get(name)) is not None:
            return getattr(self, present)
        raise AttributeError(f"'{type(self).__name__}' has no field '{name}'.")

    def __setattr__(self, name: str, value: Any) -> None:
        present = earlier_names(type(self)).get(name, name)
        if present != name:
            warnings.warn(
                f"`{name}` is now called `{present}`; the old name goes with the next release.", stacklevel=2
            )
        super().__setattr__(present, value)

    def validate(self) -> None:
        """
        Check every field against its range, see [`~papertrl.core.ranges.check_ranges`].

        Raises:
            `ValueError`: if a value is not accepted; the message names the field, the value and what is accepted.
        """
        check_ranges(self)


class ComponentConfig(ConfigMixin):
    """Base of the configs of components: plain dataclasses, which merge into the config of any trainer."""


class MethodConfigMixin(ConfigMixin):
    """Adoption, shared by every config of a trainer."""

    @classmethod
    def adopt(cls, args: Any) -> "MethodConfigMixin":
        """
        Turn `args`, a config of TRL's parent trainer or of a trainer that this one extends, into this class.

        Fields that `args` has keep its values; the method's own fields take their defaults. `args` is not changed.

        Raises:
            `TypeError`: if `args` is not a config of the same TRL family, or has fields of other methods, which would
                do nothing, whatever their values.
        """
        known = {f.name for f in fields(cls)}
        foreign = {name: owner for name, owner in introduced(type(args)).items() if name not in known}
        if foreign:
            owners = dict.fromkeys([*(cls.combined or (cls,)), *foreign.values()])
            parts = [
                _carrier(o) for o in owners if not any(o is not other and issubclass(other, o) for other in owners)
            ]
            raise TypeError(
                f"`args` is a `{type(args).__name__}`, whose fields {list(foreign)} would do nothing in "
                f"`{_carrier(cls)}`. Pass a `{cls.__name__}`, or train by `compose({', '.join(parts)})`, whose "
                "`config_class` has all of these."
            )
        if isinstance(args, cls):
            # It may have been changed since it was made
            args.validate()
            return args
        parent = next(base for base in cls.__mro__ if base.__module__.startswith("trl."))
        if not isinstance(args, parent):
            raise TypeError(
                f"`args` must be a `{cls.__name__}` or a `{parent.__name__}`, got `{type(args).__name__}`."
            )
        adopted = object.__new__(cls)
        adopted.__dict__.update(copy.copy(args.__dict__))
        for f in fields(cls):
            if f.name not in adopted.__dict__:
                setattr(adopted, f.name, field_default(f))
        adopted.validate()
        return adopted


def _carrier(config: type) -> str:
    """Name of the trainer or component that a config class belongs to."""
    stem = config.__name__.removesuffix("Config")
    return f"{stem}Trainer" if issubclass(config, MethodConfigMixin) else stem


def merge_configs(name: str, configs: tuple[type, ...]) -> type:
    """
    Config class that has the fields of all `configs`, the same in whatever order they are listed.

    Where some of them give a field of their common base different defaults, that of the class whose name comes first
    in the alphabet is taken. `differing_defaults` of the class tells.

    Args:
        name (`str`):
            Name of the new class.
        configs (`tuple` of config classes):
            Configs of trainers of one family, and of components.

    Raises:
        `TypeError`: if two of them introduce a field of the same name.
    """
    leaves = tuple(c for c in configs if not any(c is not other and issubclass(other, c) for other in configs))
    leaves = tuple(dict.fromkeys(leaves))
    if len(leaves) == 1:
        return leaves[0]
    refuse_shared_names(leaves)
    chosen, differing = _agreed_fields(
        sorted(filter(dataclasses.is_dataclass, leaves), key=lambda leaf: leaf.__name__)
    )

    def reduce_composed(self, protocol):
        # The class is made at run time, so that pickle (used by `Trainer.save_model`) must make it again
        return (_new_composed, (name, leaves), self.__dict__)

    namespace = {
        "__module__": __name__,
        "__doc__": f"Config of a trainer composed of {', '.join(c.__name__ for c in leaves)}.",
        "__reduce_ex__": reduce_composed,
        "combined": leaves,
        "differing_defaults": differing,
    }
    # Components first, so that their checks and those of the trainers' configs end in the same one
    bases = tuple(sorted(leaves, key=lambda leaf: not issubclass(leaf, ComponentConfig)))
    return _taking_earlier_names(dataclasses.make_dataclass(name, chosen, bases=bases, namespace=namespace))


def _agreed_fields(leaves: list[type]) -> tuple[list[tuple], dict[str, dict[str, Any]]]:
    """Fields of which some config has a default of its own, and the different defaults by field and config's name."""
    chosen, differing = [], {}
    for name in dict.fromkeys(name for leaf in leaves for name in leaf.__dataclass_fields__):
        having = [leaf for leaf in leaves if name in leaf.__dataclass_fields__]
        shared = next(
            base
            for base in having[0].__mro__
            if name in getattr(base, "__dataclass_fields__", ()) and all(issubclass(leaf, base) for leaf in having)
        )
        common = shared.__dataclass_fields__[name]
        own = {leaf.__name__: f for leaf in having if (f := leaf.__dataclass_fields__[name]) is not common}
        if not own:
            continue
        defaults = {leaf: field_default(f) for leaf, f in own.items()}
        first = next(iter(own.values()))
        metadata = first.metadata
        if any(value != field_default(first) for value in defaults.values()):
            differing[name] = defaults
            metadata = _Metadata(metadata, help=f"{metadata['help']} {differing_text(defaults)}")
        spec = field(default=first.default, default_factory=first.default_factory, metadata=metadata)
        chosen.append((name, first.type, spec))
    return chosen, differing


def differing_text(defaults: dict[str, Any]) -> str:
    """A sentence on a field for which methods have the different `defaults`, by config, of which the first holds."""
    wanted = ", ".join(f"{default!r} of `{leaf}`" for leaf, default in defaults.items())
    return f"The methods' defaults differ ({wanted}); the first by name holds."


def introduced(config: type) -> dict[str, type]:
    """Fields that config classes of this library add to what TRL has, each with the class that introduces it."""
    found: dict[str, type] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base) and "__annotations__" in base.__dict__:
            for f in own_fields(base):
                found.setdefault(f.name, base)
    return {name: base for name, base in found.items() if issubclass(base, ConfigMixin)}


def refuse_shared_names(configs: tuple[type, ...]) -> None:
    """
    Check that no two config classes introduce a field of the same name.

    Raises:
        `TypeError`: naming the field and both classes.
    """
    owners: dict[str, type] = {}
    for config in configs:
        for name, owner in introduced(config).items():
            if owners.setdefault(name, owner) is not owner:
                raise TypeError(
                    f"`{name}` is a field of both `{owners[name].__name__}` and `{owner.__name__}`; each method's "
                    "fields must begin with its own prefix."
                )


def _new_composed(name: str, leaves: tuple[type, ...]) -> Any:
    return object.__new__(merge_configs(name, leaves))


def refuse_label_smoothing_factor(args: Any, instead: str) -> None:
    """
    Check that `label_smoothing_factor` is off, where the loss of TRL's trainer does not read it.

    Raises:
        `ValueError`: with what to do `instead`.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0, got {args.label_smoothing_factor}: the loss of these trainers does "
            f"not read it. Leave it out, or {instead}."
        )
