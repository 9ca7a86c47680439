"""How methods share stages: what each changes, when it is on, and in which order those that are on act."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .declaration import Method

Settings = Mapping[str, Any]
# Config values under which a stage is off: all of them, or, of several, all of one; none if it is never
Off = Settings | tuple[Settings, ...]


def ways_off(off: Off) -> list[Settings]:
    """Each of the settings under which a stage is off."""
    return [way for way in (off if isinstance(off, tuple) else (off,)) if way]


def _mapping(cls: type, name: str) -> Mapping[str, Off]:
    found = cls.__dict__.get(name, {})
    if not isinstance(found, Mapping):
        raise TypeError(
            f"`{cls.__name__}.{name}` must map stages to the settings under which they are off, got {found!r}."
        )
    return found


def is_off(off: Off, args: Any) -> bool:
    """Whether a stage that is `off` under some settings is so under the config `args`."""
    return any(all(getattr(args, name) == value for name, value in way.items()) for way in ways_off(off))


def remedy(off: Off) -> str:
    """Settings under which a stage is off, as text; empty if it never is."""
    return " or ".join(" and ".join(f"{name}={value!r}" for name, value in way.items()) for way in ways_off(off))


@dataclass(frozen=True)
class Link:
    """One of those that act in a stage: the class or function it comes from, and what it does."""

    owner: Any
    run: Callable


class Staged:
    """
    Mixin of trainers whose step is a sequence of stages.

    A family's base names its stages in `stages`: by name, the functions that a stage consists of. A method, which is
    a subclass with a [`Method`] of its own as `method`, says which it changes:

    - `extends`: stages in which it acts beside others, calling `super()`;
    - `replaces`: stages that it decides alone. At most one of the methods of a trainer may, under its config.

    Both map a stage to the config values under which the method leaves it alone; without any it never does. A stage's
    functions are called only while it is on, so that they need not ask. Extenders act in the order of inheritance,
    around the one that replaces the stage, around the base: `super()` in a stage leads to the next of them, whatever
    the order in which methods were listed.

    A class that declares nothing, such as a user's, overrides a stage's functions as in plain inheritance: it acts
    among the extenders, or, listed after the one that replaces the stage, inside of that. Without `super()` it
    overrides those that it derives from; were others behind it, or it behind one that leads nowhere, the
    configuration is refused. A mixin that does not derive
    from the family acts around all methods, and must be listed before them.

    Raises:
        `TypeError`: at class creation, if a method names a stage that there is not, or overrides a function of the
            base whose stage it does not name, or if a mixin of no family would be hidden by what is listed before it.
    """

    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # What a method may override beside stages: each calls `super()`
    hooks: ClassVar[tuple[str, ...]] = ()
    method: ClassVar[Method | None] = None
    extends: ClassVar[Mapping[str, Off]] = {}
    replaces: ClassVar[Mapping[str, Off]] = {}
    methods: ClassVar[tuple[Method, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not isinstance(cls.__dict__.get("method"), (Method, type(None))):
            raise TypeError(f"`{cls.__name__}.method` must be a `Method`, got {cls.__dict__['method']!r}.")
        if isinstance(cls.__dict__.get("method"), Method):
            cls._check_declaration()
        cls._check_mixins()
        functions = cls._functions()
        for name in functions if "stages" in cls.__dict__ else functions & cls.__dict__.keys():
            _install(cls, name, inspect.getattr_static(cls, name))
        cls.methods = tuple(owner.method for owner in cls.owners())

    @classmethod
    def owners(cls) -> list[type]:
        """Classes of the methods that are combined in this one, in order of inheritance."""
        return [base for base in cls.__mro__ if isinstance(base.__dict__.get("method"), Method)]

    @classmethod
    def _check_mixins(cls) -> None:
        """Check that no class that is not of the family is hidden, as those behind a method are."""
        order = cls.__mro__
        family = next((base for base in order if "stages" in base.__dict__), cls)
        behind = order[next((i for i, base in enumerate(order) if base in (*cls.owners(), family)), 0) :]
        for base in behind:
            hidden = sorted(cls._functions() & base.__dict__.keys())
            if hidden and not issubclass(base, Staged) and base not in family.__mro__:
                raise TypeError(
                    f"`{cls.__name__}`: `{base.__name__}` overrides `{hidden[0]}` of the stage "
                    f"'{cls.stage_of(hidden[0])}' behind `{behind[0].__name__}`, where nobody would call it. List it "
                    f"first, or derive it from `{family.__name__}`."
                )

    @classmethod
    def _functions(cls) -> set[str]:
        return {function for functions in cls.stages.values() for function in functions}

    @classmethod
    def stage_of(cls, function: str) -> str:
        """Stage that a function belongs to."""
        return next(stage for stage, functions in cls.stages.items() if function in functions)

    @classmethod
    def _check_declaration(cls) -> None:
        for name in ("extends", "replaces"):
            for stage, off in _mapping(cls, name).items():
                ways = off if isinstance(off, tuple) else (off,)
                if not all(isinstance(way, Mapping) for way in ways):
                    raise TypeError(
                        f"`{cls.__name__}.{name}['{stage}']` must be a mapping of settings, or a tuple of these, got "
                        f"{off!r}."
                    )
        declared = {**cls.__dict__.get("extends", {}), **cls.__dict__.get("replaces", {})}
        unknown = [stage for stage in declared if stage not in cls.stages]
        if unknown:
            raise TypeError(
                f"Method '{cls.method.name}' names stages {unknown}, but those of the family are {tuple(cls.stages)}."
            )
        twice = cls.__dict__.get("extends", {}).keys() & cls.__dict__.get("replaces", {}).keys()
        if twice:
            raise TypeError(f"Method '{cls.method.name}' both extends and replaces {sorted(twice)}; choose one.")
        mine = {function for stage in declared for function in cls.stages[stage]}
        free = {"method", "methods", "extends", "replaces", "components", "config_class", *cls.hooks}
        parents = [base for base in cls.__mro__[1:] if base is not object]
        for name in cls.__dict__:
            if name in mine or name in free or name.startswith("__"):
                continue
            if name in cls._functions():
                raise TypeError(
                    f"Method '{cls.method.name}' overrides `{name}` of the stage '{cls.stage_of(name)}', which it "
                    "does not declare: add the stage to `extends` or `replaces`."
                )
            if any(name in base.__dict__ for base in parents):
                raise TypeError(
                    f"Method '{cls.method.name}' overrides `{name}`, which is no stage: methods act in the stages "
                    f"{tuple(cls.stages)} and in the hooks {cls.hooks}."
                )

    # --- Who acts -----------------------------------------------------------------------------------------------

    @classmethod
    def deciding(cls, stage: str, args: Any) -> list[type]:
        """Classes of the methods that replace `stage` under `args`; of a method and its subclass, the latter."""
        found = cls._replacing(stage, args)
        return [
            owner for owner in found if not any(owner is not other and issubclass(other, owner) for other in found)
        ]

    @classmethod
    def _replacing(cls, stage: str, args: Any) -> list[type]:
        return [
            owner
            for owner in cls.owners()
            if stage in owner.__dict__.get("replaces", {}) and not is_off(owner.replaces[stage], args)
        ]

    @classmethod
    def acting(cls, stage: str, args: Any) -> list[type]:
        """Classes of the methods that act in `stage` under the config `args`: extenders, then who replaces it."""
        extending = [
            owner
            for owner in cls.owners()
            if stage in owner.__dict__.get("extends", {}) and not is_off(owner.extends[stage], args)
        ]
        return extending + cls._replacing(stage, args)

    @classmethod
    def names_acting(cls, stage: str, args: Any) -> list[str]:
        """Names of the methods that act in `stage` under the config `args`."""
        return [owner.method.name for owner in cls.acting(stage, args)]

    def replaced_by(self, stage: str) -> str | None:
        """Name of the method that decides `stage` under the present config, or `None` if nobody does."""
        return next((owner.method.name for owner in type(self).deciding(stage, self.args)), None)

    @classmethod
    def refuse_clashes(cls, args: Any) -> None:
        """
        Check that no two methods of this class replace the same stage under the config `args`, and that no class
        without a method keeps others from acting, or is kept.

        Raises:
            `ValueError`: naming both methods, the stage, and the settings that resolve the clash; or the function
                that calls no `super()`, who is behind it, and what to do.
        """
        for stage in cls.stages:
            found = cls.deciding(stage, args)
            if len(found) < 2:
                continue
            first, second = found[:2]
            ways = " or ".join(
                f"{remedy(owner.replaces[stage])} ('{owner.method.name}' then leaves the stage alone)"
                for owner in (first, second)
                if remedy(owner.replaces[stage])
            )
            raise ValueError(
                f"Methods '{first.method.name}' and '{second.method.name}' do not combine as they are: both replace "
                f"the stage '{stage}'. Leave one of them out{f', or set {ways}' if ways else ''}."
            )

        for function in sorted(cls._functions()):
            cls._refuse_hidden(function, args)

    @classmethod
    def _refuse_hidden(cls, function: str, args: Any) -> None:
        """Check that nobody is behind a function that calls no `super()`, other than whom its class derives from."""
        extending, replacing = cls._ordered(function, args)
        order = [*extending, *replacing]
        for place, owner in enumerate(order):
            behind = [other for other in order[place + 1 :] if not issubclass(owner, other)]
            # An extender may answer alone where its answer holds for everybody
            extends = owner in cls.owners() and owner in extending
            if not behind or extends or _leads_on(owner.__dict__[function], function):
                continue
            names = [other.__name__ for other in behind]
            told = (
                f"`{owner.__name__}.{function}` of the stage '{cls.stage_of(function)}' calls no `super()`, so that "
            )
            if owner in cls.owners():
                raise ValueError(f"{told}{names}, listed behind it, never act. List them first, calling `super()`.")
            last = "" if set(behind) & set(replacing) else ", list the class last"
            raise ValueError(
                f"{told}{names}, listed behind it, never act. Call it{last}, or derive the class from those that it "
                "is to override."
            )

    # --- Running a stage ----------------------------------------------------------------------------------------

    @classmethod
    def _ordered(cls, function: str, args: Any) -> tuple[list[type], list[type]]:
        """Classes whose `function` runs under `args`, before the base's: around the replacement, and from it on."""
        stage = cls.stage_of(function)
        base = next(b for b in cls.__mro__ if "stages" in b.__dict__)
        below_base = cls.__mro__[: cls.__mro__.index(base)]
        acting, deciding = cls.acting(stage, args), cls._replacing(stage, args)
        plain = [b for b in below_base if issubclass(b, Staged) and b not in cls.owners()]
        extending, replacing = [], []
        for owner in below_base:
            if function in owner.__dict__ and owner in (*acting, *plain):
                (replacing if owner in deciding or (replacing and owner in plain) else extending).append(owner)
        return extending, replacing

    def _chain(self, function: str) -> list[Link]:
        cls = type(self)
        around, inside = self._user_links(cls.stage_of(function), function)
        base = next(b for b in cls.__mro__ if "stages" in b.__dict__)
        extending, replacing = (
            [Link(owner, owner.__dict__[function].implementation) for owner in owners]
            for owners in cls._ordered(function, self.args)
        )
        return [*around, *extending, *inside, *replacing, Link(base, base.__dict__[function].implementation)]

    def _user_links(self, stage: str, function: str) -> tuple[list[Link], list[Link]]:
        """A user's functions that act in a stage: around the methods, and in place of the base."""
        return [], []

    def _run(self, function: str, called: type, args: tuple, kwargs: dict[str, Any]) -> Any:
        """
        Run a stage's function from the start or, where `super()` of one of those that act led here, from the next.

        `called` is the class whose function was found. What is found by `super()` stands behind the class that asks,
        whereas `self.function()` finds the first.
        """
        running = self.__dict__.setdefault("_running", {})
        current = running.get(function)
        place = 0
        if current is None:
            chain = self._chain(function)
        else:
            chain, place = current
            asks = chain[place].owner
            order = type(self).__mro__
            if not isinstance(asks, type) or order.index(called) > order.index(asks):
                place += 1
            else:
                chain, place = self._chain(function), 0
        running[function] = (chain, place)
        try:
            return chain[place].run(self, *args, **kwargs)
        finally:
            running[function] = current


def _leads_on(found: Any, name: str) -> bool:
    """Whether a function calls `super()`, or the function `name` of a class; true where its code cannot be seen."""
    code = getattr(inspect.unwrap(getattr(found, "__func__", found)), "__code__", None)
    if code is None:
        return True
    codes = [code, *(const for const in code.co_consts if inspect.iscode(const))]
    return any({"super", name} & set(each.co_names) for each in codes)


def _install(owner: type, name: str, found: Any) -> None:
    """Put a function in place that runs the stage, and keep `found` as its implementation."""
    if isinstance(found, classmethod):
        setattr(owner, name, classmethod(_class_function(owner, name, found.__func__)))
        return
    implementation = getattr(found, "implementation", found)
    if any(isinstance(base.__dict__.get(name), classmethod) for base in owner.__mro__[1:]):
        raise TypeError(f"`{owner.__name__}.{name}` must be a class method, as in the base.")

    @functools.wraps(implementation)
    def run(self, *args, **kwargs):
        return self._run(name, owner, args, kwargs)

    run.implementation = implementation
    setattr(owner, name, run)


def _class_function(owner: type, name: str, implementation: Callable) -> Callable:
    """A class method of a stage, which is told the config: passed over while the stage is off."""

    @functools.wraps(implementation)
    def run(cls, args, *rest, **kwargs):
        stage = cls.stage_of(name)
        off = owner.__dict__.get("extends", {}).get(stage) or owner.__dict__.get("replaces", {}).get(stage) or {}
        if is_off(off, args):
            return getattr(super(owner, cls), name)(args, *rest, **kwargs)
        return implementation(cls, args, *rest, **kwargs)

    return run
