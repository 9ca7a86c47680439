"""How methods share stages, on classes without a model: what is refused, who acts when, and in which order."""

import itertools
from types import SimpleNamespace

import pytest
from trl import GRPOConfig

from papertrl import PolicyTrainer
from papertrl.core.catalogue import load
from papertrl.core.declaration import Method
from papertrl.core.stages import Staged, is_off, remedy


class Parent:
    """Stands for TRL's trainer."""

    def _private(self):
        return "parent"


class Base(Staged, Parent):
    """Family of two stages of a function each, one of two, and one that is asked of the class."""

    stages = {"mix": ("mix",), "weigh": ("weigh",), "count": ("first", "second"), "columns": ("columns",)}
    hooks = ("state",)

    def __init__(self, **args):
        self.args = SimpleNamespace(**args)

    def mix(self, value=0):
        return [f"base({value})"]

    def weigh(self):
        return ["weigh", *self.mix()]

    def first(self):
        return 1

    def second(self):
        return [f"second of {self.first()}"]

    @classmethod
    def columns(cls, args):
        return []

    def state(self):
        return {}

    def helper(self):
        return "base"


def named(name: str) -> Method:
    return Method(name, family="policy")


def make(name: str, base: type = Base, **body) -> type:
    """A method's class, as a class statement would make it."""
    return type(name.capitalize(), (base,), {"method": named(name)} | body)


def extender(name: str, **off) -> type:
    class Extender(Base):
        method = named(name)
        extends = {"mix": off}

        def mix(self, value=0):
            return [name, *super().mix(value + 1)]

    return Extender


def replacer(name: str, **off) -> type:
    class Replacer(Base):
        method = named(name)
        replaces = {"mix": off}

        def mix(self, value=0):
            return [f"{name}({value})"]

    return Replacer


def plain(name: str, *bases: type) -> type:
    """What a user writes: a class that declares nothing."""

    class Plain(*(bases or (Base,))):
        def mix(self, value=0):
            return [name, *super().mix(value + 1)]

    return Plain


def combine(*classes: type, **args) -> Base:
    return type("Combined", classes, {})(**args)


# --- What is refused ----------------------------------------------------------------------------------------------


def nothing(self):
    return None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"mix": nothing}, "'odd' overrides `mix` of the stage 'mix', which it does not declare"),
        (
            {"extends": {"mix": {}}, "second": nothing},
            "'odd' overrides `second` of the stage 'count', which it does not declare",
        ),
        ({"columns": classmethod(nothing)}, "'odd' overrides `columns` of the stage 'columns'"),
        ({"helper": nothing}, r"'odd' overrides `helper`, which is no stage: .*hooks \('state',\)"),
        ({"_private": nothing}, "'odd' overrides `_private`, which is no stage"),
        ({"extends": {"brew": {}}}, r"'odd' names stages \['brew'\], but those of the family are \('mix', "),
        ({"replaces": {"brew": {}}}, r"'odd' names stages \['brew'\]"),
        ({"extends": {"mix": {}}, "replaces": {"mix": {}}}, r"'odd' both extends and replaces \['mix'\]"),
        ({"extends": ("mix",)}, r"`Odd.extends` must map stages to the settings under which they are off"),
        ({"extends": {"mix": None}}, r"`Odd.extends\['mix'\]` must be a mapping of settings"),
        ({"extends": {"columns": {}}, "columns": nothing}, r"`Odd.columns` must be a class method"),
    ],
)
def test_what_is_not_declared_is_refused(body, message):
    with pytest.raises(TypeError, match=message):
        make("odd", **body)


def test_hooks_own_names_and_plain_classes_are_free():
    made = make("free", state=nothing, mine=nothing, __init__=Base.__init__)
    assert [m.name for m in made.methods] == ["free"]
    assert make("again", made, helper_of_mine=nothing).methods[1].name == "free"
    type("Plain", (Base,), {"mix": nothing, "helper": nothing, "_private": nothing})


def test_a_declaration_is_not_inherited():
    with pytest.raises(TypeError, match="'two' overrides `mix` of the stage 'mix'"):
        make("two", extender("one"), mix=nothing)


def test_two_replacements_clash_unless_one_is_off():
    clash = type("Clash", (replacer("one", a=0), replacer("two", b=0, c=None)), {})
    with pytest.raises(
        ValueError,
        match=r"'one' and 'two' do not .*stage 'mix'.*set a=0 \('one' then .* or b=0 and c=None \('two' then",
    ):
        clash.refuse_clashes(SimpleNamespace(a=1, b=0, c=1))
    clash.refuse_clashes(SimpleNamespace(a=0, b=1, c=1))
    clash.refuse_clashes(SimpleNamespace(a=1, b=0, c=None))
    always = type("Always", (replacer("one"), replacer("two")), {})
    with pytest.raises(ValueError, match=r"Leave one of them out\.$"):
        always.refuse_clashes(SimpleNamespace())


# --- When a stage is off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("off", "expected", "text"),
    [
        ({}, False, ""),
        ({"a": 0}, True, "a=0"),
        ({"a": 0, "b": "none"}, True, "a=0 and b='none'"),
        ({"a": 0, "b": "some"}, False, "a=0 and b='some'"),
        (({"a": 1}, {"b": "none"}), True, "a=1 or b='none'"),
        (({"a": 1}, {"a": 0, "b": "some"}), False, "a=1 or a=0 and b='some'"),
    ],
)
def test_a_stage_is_off_under_all_settings_of_one_way(off, expected, text):
    assert is_off(off, SimpleNamespace(a=0, b="none")) is expected
    assert remedy(off) == text


def test_functions_are_called_only_while_the_stage_is_on():
    classes = extender("one", a=0), replacer("two", b=0), extender("three")
    assert combine(*classes, a=1, b=1).mix() == ["one", "three", "two(2)"]
    assert combine(*classes, a=0, b=1).mix() == ["three", "two(1)"]
    assert combine(*classes, a=1, b=0).mix() == ["one", "three", "base(2)"]
    assert combine(*classes, a=0, b=0).mix() == ["three", "base(1)"]
    trainer = combine(*classes, a=0, b=1)
    assert trainer.names_acting("mix", trainer.args) == ["three", "two"]
    assert trainer.replaced_by("mix") == "two" and trainer.replaced_by("weigh") is None
    # Settings may change during a run
    trainer.args.b = 0
    assert trainer.mix() == ["three", "base(1)"] and trainer.replaced_by("mix") is None


def test_functions_of_one_stage_go_on_and_off_together():
    class Counts(Base):
        method = named("counts")
        extends = {"count": {"a": 0}}

        def first(self):
            return super().first() + 1

        def second(self):
            return [*super().second(), "more"]

    assert (Counts(a=1).first(), Counts(a=1).second()) == (2, ["second of 2", "more"])
    assert (Counts(a=0).first(), Counts(a=0).second()) == (1, ["second of 1"])


# --- In which order -----------------------------------------------------------------------------------------------


def test_the_replacement_is_innermost_in_whatever_order_methods_are_listed():
    one, two, replaces = extender("one"), extender("two"), replacer("three")
    results = {tuple(combine(*order).mix()) for order in itertools.permutations([one, two, replaces])}
    assert results == {("one", "two", "three(2)"), ("two", "one", "three(2)")}
    assert combine(replaces, one).mix() == combine(one, replaces).mix() == ["one", "three(1)"]


class Doubles(Base):
    """A replacement that calls `super()`."""

    method = named("doubles")
    replaces = {"mix": {}}

    def mix(self, value=0):
        return [*super().mix(value), *super().mix(10)]


def test_a_replacement_that_calls_super_gets_the_base():
    expected = ["one", "base(1)", "base(10)"]
    assert combine(Doubles, extender("one")).mix() == combine(extender("one"), Doubles).mix() == expected


def test_a_method_may_replace_what_it_leaves_to_the_base():
    forbids = make("forbids", replaces={"mix": {"a": 0}})
    assert combine(forbids, extender("one"), a=1).mix() == ["one", "base(1)"]
    with pytest.raises(ValueError, match="'forbids' and 'two'"):
        type("Clash", (forbids, replacer("two")), {}).refuse_clashes(SimpleNamespace(a=1))


# --- Functions that call stages -----------------------------------------------------------------------------------


def test_a_stage_called_from_another_begins_anew():
    assert combine(extender("one"), replacer("two")).weigh() == ["weigh", "one", "two(1)"]

    class Weighs(Base):
        method = named("weighs")
        extends = {"weigh": {}}

        def weigh(self):
            return [*self.mix(5), *super().weigh()]

    assert combine(replacer("two"), Weighs, extender("one")).weigh() == ["one", "two(6)", "weigh", "one", "two(1)"]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_a_stage_called_from_itself_begins_anew(order):
    class Repeats(Base):
        method = named("repeats")
        extends = {"mix": {}}

        def mix(self, value=0):
            again = self.mix(100) if value < 100 else []
            return [*super().mix(value), *again]

    classes = [Repeats, extender("one"), replacer("two")]
    assert sorted(combine(*(classes[i] for i in order)).mix()) == ["one", "one", "two(1)", "two(101)"]


def test_a_stage_called_from_the_base_of_itself_begins_anew():
    class Nested(Base):
        stages = Base.stages

        def mix(self, value=0):
            return [f"nested({value})", *(self.mix(100) if value < 100 else [])]

    class Extends(Nested):
        method = named("extends")
        extends = {"mix": {}}

        def mix(self, value=0):
            return ["extends", *super().mix(value + 1)]

    assert Extends().mix() == ["extends", "nested(1)", "extends", "nested(101)"]


def test_one_stage_goes_on_after_another_led_back_to_it():
    """mix of one method → weigh → mix, all of it → `super()` of the first."""

    class Circles(Base):
        method = named("circles")
        extends = {"mix": {}}

        def mix(self, value=0):
            inner = self.weigh() if value == 0 else []
            return ["circles", *inner, *super().mix(value + 1)]

    weighs = make("weighs", extends={"weigh": {}}, weigh=lambda self: ["w", *self.mix(10)])
    expected = ["circles", "w", "circles", "one(11)", "one(1)"]
    for order in itertools.permutations([Circles, weighs, replacer("one")]):
        assert combine(*order).mix() == expected


def test_an_exception_leaves_nothing_running():
    class Fails(Base):
        method = named("fails")
        extends = {"mix": {}, "weigh": {}}

        def mix(self, value=0):
            if self.args.fail:
                raise KeyError("mix")
            return ["fails", *super().mix(value)]

        def weigh(self):
            try:
                return super().weigh()
            except KeyError:
                self.args.fail = False
                return ["caught", *super().weigh()]

    trainer = combine(extender("one"), replacer("two"), Fails, fail=True)
    with pytest.raises(KeyError):
        trainer.mix()
    assert set(trainer._running.values()) <= {None}
    assert trainer.weigh() == ["caught", "weigh", "one", "fails", "two(1)"]
    assert set(trainer._running.values()) <= {None}
    assert trainer.mix() == ["one", "fails", "two(1)"]


# --- Classes that declare nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0, 1])
def test_a_plain_class_on_top_acts_on_what_the_methods_came_to(a):
    one = ["one"] * a
    both = extender("one", a=0), replacer("two")
    for order in (both, both[::-1]):
        assert plain("top", *order)(a=a).mix() == ["top", *one, f"two({1 + a})"]
        assert plain("higher", plain("top", *order))(a=a).mix() == ["higher", "top", *one, f"two({2 + a})"]
    silent = type("Silent", both, {"mix": lambda self, value=0: ["silent"]})
    assert silent(a=a).mix() == silent(a=a).weigh()[1:] == ["silent"]


@pytest.mark.parametrize("c", [0, 1])
@pytest.mark.parametrize("a", [0, 1])
def test_a_plain_class_between_methods_keeps_its_place(a, c):
    """Whether the methods before it are on or off."""
    first, last = extender("first", a=0), extender("last", c=0)
    expected = [*["first"] * a, "middle", *["last"] * c, f"base({1 + a + c})"]
    assert combine(first, plain("middle", last), a=a, c=c).mix() == expected
    assert combine(first, plain("middle"), last, a=a, c=c).mix() == expected


def test_a_plain_class_under_a_replacement_is_hidden_as_in_plain_inheritance():
    replaces, middle, one = replacer("two", b=0), plain("middle"), extender("one")
    assert combine(replaces, middle, b=1).mix() == ["two(0)"]
    assert combine(replaces, middle, one, b=1).mix() == ["one", "two(1)"]
    assert combine(middle, replaces, one, b=1).mix() == ["middle", "one", "two(2)"]
    assert combine(replaces, middle, one, b=0).mix() == ["middle", "one", "base(2)"]
    expected = ["one", "middle", "base(2)", "middle", "base(11)"]
    assert combine(Doubles, middle, one).mix() == combine(Doubles, one, middle).mix() == expected


def test_a_plain_class_that_would_silence_others_or_be_silenced_is_refused():
    one, replaces, middle = extender("one", a=0), replacer("two", b=0), plain("middle")
    silent = type("Silent", (Base,), {"mix": lambda self, value=0: ["silent"]})
    over = type("Over", (replaces,), {"mix": lambda self, value=0: ["over"]})

    def told(*order, a=1, b=1):
        try:
            type("Mine", order, {}).refuse_clashes(SimpleNamespace(a=a, b=b))
        except ValueError as error:
            return str(error)

    # Of nobody's silence: those that lead on, a way of its own over what a class derives from, methods that are off
    for order in ((middle, one, replaces), (one, silent), (over,), (one, over), (Doubles, middle)):
        assert told(*order) is None
    assert told(silent, one, a=0) is None and told(replaces, middle, b=0) is None
    for order in ((silent, one), (over, one)):
        assert "['Extender'], listed behind it, never act. Call it, list the class last, or" in told(*order)
    assert "`Silent.mix` of the stage 'mix'" in told(silent, replaces) and "list the" not in told(silent, replaces)
    for order in ((replaces, middle), (replaces, silent)):
        assert "never act. List them first, calling `super()`." in told(*order)


class Foreign:
    """A mixin of no family."""

    def mix(self, value=0):
        return ["foreign", *super().mix(value + 1)]


def test_a_foreign_mixin_acts_around_all_methods_or_is_refused():
    one, replaces = extender("one"), replacer("two")
    for order in ((one, replaces), (replaces, one)):
        top = type("Top", (Foreign, *order), {})
        assert top().mix() == ["foreign", "one", "two(2)"]
        assert plain("higher", top)().mix() == ["higher", "foreign", "one", "two(3)"]
        assert top().weigh() == ["weigh", "foreign", "one", "two(2)"]
    told = (
        r"`Hidden`: `Foreign` overrides `mix` of the stage 'mix' behind `(Extender|Base|Top)`.*derive it from `Base`"
    )
    for order in ((one, Foreign), (Base, Foreign), (one, Foreign, replaces), (extender("three"), top)):
        with pytest.raises(TypeError, match=told):
            type("Hidden", order, {})
    # What touches no stage may stand anywhere
    assert type("Free", (one, type("Other", (), {"state": nothing})), {})().mix() == ["one", "base(1)"]


def column(name: str, **off) -> type:
    class Column(Base):
        method = named(name)
        extends = {"columns": off}

        @classmethod
        def columns(cls, args):
            return [*super().columns(args), name]

    return Column


def test_functions_of_the_class_are_told_the_config():
    both = type("Both", (column("one", a=0), column("two", b=0)), {})
    assert both.columns(SimpleNamespace(a=1, b=1)) == ["two", "one"]
    assert both.columns(SimpleNamespace(a=0, b=1)) == ["two"]
    assert both.columns(SimpleNamespace(a=1, b=0)) == ["one"]
    assert both.columns(SimpleNamespace(a=0, b=0)) == []
    assert both(a=0, b=0).columns(SimpleNamespace(a=1, b=1)) == ["two", "one"]


def test_a_plain_class_extends_functions_of_the_class():
    class Plain(column("one", a=0)):
        @classmethod
        def columns(cls, args):
            return [*super().columns(args), "plain"]

    both = type("Both", (column("two", b=0), Plain), {})
    assert both.columns(SimpleNamespace(a=0, b=0)) == ["plain"]
    assert both.columns(SimpleNamespace(a=1, b=1)) == ["one", "plain", "two"]


def test_settings_that_are_no_fields_are_refused_at_class_creation():
    with pytest.raises(TypeError, match=r"stage 'scale' is off under \['nothing_like_it'\], but `PolicyConfig`"):
        type(
            "Odd",
            (PolicyTrainer,),
            {"method": Method("odd", family="policy"), "extends": {"scale": {"nothing_like_it": 0}}},
        )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"method": Method("odd", family="preference")}, "'odd' is declared as objective of preference, but is the"),
        (
            {"method": Method("odd", family="policy", neutral={"od": 0})},
            r"neutral settings \['od'\], but `PolicyConfig`",
        ),
        ({"method": "odd"}, "`Odd.method` must be a `Method`, got 'odd'"),
        ({"components": ("gain_rl",)}, r"`Odd.components` must be component classes, got \['gain_rl'\]"),
    ],
)
def test_a_trainer_keeps_to_its_declaration(body, message):
    with pytest.raises(TypeError, match=message):
        type("Odd", (PolicyTrainer,), {"method": Method("odd", family="policy"), **body})


def test_a_config_of_trl_under_which_a_stage_is_off_is_warned_about(tmp_path, caplog):
    trainer_class = load("lite_ppo")
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with caplog.at_level("WARNING"):
        trainer_class.make_config(args, None)
    assert "'lite_ppo' leaves the stage 'scale' alone with scale_rewards='group'" in caplog.text
    caplog.clear()
    trainer_class.make_config(trainer_class.config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False), None)
    assert not caplog.text
