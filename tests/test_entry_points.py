"""Methods of other packages: found by the entry point group `papertrl.methods`, combined and trained like ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .job.conftest import flags

OBJECTIVE = '''
from papertrl.core.configuration import method_config, method_field
from papertrl.core.declaration import declared
from papertrl.trainers.policy.base import PolicyConfig, PolicyTrainer


@method_config
class HalvedConfig(PolicyConfig):
    """Configuration of [`Halved`]."""

    halved_factor: float = method_field(0.5, "Factor on advantages.", ge=0)


class Halved(PolicyTrainer):
    method = declared("halved", __file__)
    config_class = HalvedConfig
    extends = {"scale": {"halved_factor": 1.0}}

    def scale(self, scored, rewards, centered):
        advantages = super().scale(scored, rewards, centered)
        self.log_metric("halved/factor", self.args.halved_factor)
        return self.args.halved_factor * advantages
'''
COMPONENT = '''
from papertrl.core.configuration import ComponentConfig, method_config, method_field
from papertrl.core.declaration import declared
from papertrl.core.slots import Component
from transformers import TrainerCallback


@method_config
class CounterConfig(ComponentConfig):
    """Configuration of [`Counter`]."""

    counter_by: int = method_field(1, "What each step counts.", ge=0)


class Count(TrainerCallback):
    def __init__(self, component):
        self.component, self.total = component, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.total += self.component.config.counter_by
        self.component.log_metric("counter/total", float(self.total))


class Counter(Component):
    method = declared("counter", __file__)
    config_class = CounterConfig

    def callbacks(self):
        return [Count(self)]
'''
DECLARED = {
    "halved": 'kind = "objective"\nfamily = "policy"\nsummary = "Halves advantages"\nsignal = "halved/factor"\n'
    "[neutral]\nhalved_factor = 1.0\n",
    "counter": 'kind = "component"\nslot = "observer"\nsummary = "Counts steps"\nsignal = "counter/total"\n'
    "[neutral]\ncounter_by = 0\n",
}
POINTS = {"halved": "their.methods.halved:Halved", "counter": "their.methods.counter:Counter"}


def write_package(folder: Path, points: dict[str, str], name: str = "their-methods") -> None:
    """A package as an installer would leave it; its `__init__` imports this library, as some do."""
    methods = folder / "their" / "methods"
    methods.mkdir(parents=True, exist_ok=True)
    (folder / "their" / "__init__.py").write_text("from papertrl import PolicyTrainer\n")
    (methods / "__init__.py").write_text("")
    (methods / "halved.py").write_text(OBJECTIVE)
    (methods / "counter.py").write_text(COMPONENT)
    for method, text in DECLARED.items():
        (methods / f"{method}.toml").write_text(text)
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{method} = {entry}" for method, entry in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[papertrl.methods]", *lines]) + "\n")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    write_package(folder, POINTS)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=170,
    )


def papertrl(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return python(folder, "-c", "import sys; from papertrl.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def test_the_catalogue_lists_them_without_loading_them(package):
    code = (
        "import sys; from papertrl.cli import main; main(['methods']);"
        "assert 'their' not in sys.modules and 'torch' not in sys.modules"
    )
    listed = python(package, "-c", code)
    assert listed.returncode == 0, listed.stderr
    policy, rest = listed.stdout.split("Objectives of the family preference")
    assert "  halved " in policy and "Halves advantages" in policy
    assert "Components of the slot observer" in rest and "  counter " in rest and "Counts steps" in rest
    assert listed.stderr == ""


def test_they_compose_by_name_and_are_public(package):
    code = (
        "from papertrl import compose, HalvedGRPOTrainer, Counter, CounterConfig\n"
        "made = compose('lp_reg', 'halved', 'counter')\n"
        "assert made.__name__ == 'LpRegHalvedCounterGRPOTrainer' or print(made.__name__)\n"
        "assert [m.name for m in made.methods] == ['lp_reg', 'halved', 'counter']\n"
        "args = made.config_class('x', halved_factor=0.25, counter_by=2, lp_reg_rho=0.5, bf16=False, use_cpu=True)\n"
        "assert (args.halved_factor, args.counter_by) == (0.25, 2)\n"
        "assert made.__mro__[2] is HalvedGRPOTrainer and made.components == (Counter,)\n"
    )
    composed = python(package, "-W", "ignore", "-c", code)
    assert composed.returncode == 0, composed.stdout + composed.stderr


def test_they_train_from_the_command_line(package, tmp_path):
    run = flags(max_steps=2, start_model_steps=20)
    names = ["--methods", "halved", "lp_reg", "counter", "--counter_by", "3", "--output_dir", str(tmp_path / "out")]
    trained = papertrl(package, "train", *run, *names)
    assert trained.returncode == 0, trained.stderr
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert '"halved/factor": 0.5' in metrics and '"counter/total": 6.0' in metrics
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**halved** (`halved`): Halves advantages." in card and "in the slot *observer*): Counts steps." in card
    assert "| `halved_factor` | `0.5` |" in card and "| `counter_by` | `3` |" in card


@pytest.mark.parametrize(
    ("points", "parts"),
    [
        ({"gone": "their.methods.gone:Gone"}, ["'their.methods.gone:Gone' names no module"]),
        ({"gone": "nowhere:Gone"}, ["'nowhere:Gone' names no module"]),
        ({"bare": "their.methods.halved:Bare"}, ["there is no 'bare.toml' beside"]),
        ({"lp_reg": "their.methods.halved:Halved"}, ["there is a method of that name already"]),
    ],
)
def test_a_broken_entry_point_is_told_in_one_sentence(points, parts, tmp_path):
    write_package(tmp_path, points)
    (name,) = points
    listed = papertrl(tmp_path, "methods")
    assert listed.returncode == 0 and "Objectives of the family policy" in listed.stdout
    assert listed.stderr.count("\n") == 1
    for part in (f"papertrl: Package 'their-methods' adds the method '{name}' in vain: ", *parts):
        assert part in listed.stderr


def test_what_is_broken_is_told_where_it_is_asked_for(tmp_path):
    write_package(tmp_path, {"bare": "their.methods.halved:Bare", "halved": "their.methods.halved:NoSuchClass"})
    code = (
        "from papertrl import compose\n"
        "for name in ('bare', 'halved'):\n"
        "    try:\n"
        "        compose(name)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    bare, halved = python(tmp_path, "-W", "ignore", "-c", code).stdout.splitlines()
    assert "Package 'their-methods' adds the method 'bare' in vain" in bare
    assert halved.startswith(
        "Method 'halved' cannot be loaded from its entry point 'their.methods.halved:NoSuchClass'"
    )


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('family = "poetry"', "`family` in '"),
        ('kind = "component"\nslot = "poems"', "`slot` in '"),
        ("family = 3 = 4", "does not declare a method"),
        ('family = "policy"\nsumary = "Halves"', "it has the keys ['sumary']"),
        ('family = "policy"\ntags = "halved"', "`tags` must be a list of texts, got 'halved'"),
        ('family = "policy"\nneutral = 0', "`neutral` of method 'halved' must be a table, got 0"),
        ('family = "policy"\npaper = "Halving"', "`paper` must be a table, got 'Halving'"),
    ],
)
def test_a_declaration_of_nothing_we_have_is_refused(line, part, tmp_path):
    write_package(tmp_path, {"halved": POINTS["halved"]})
    (tmp_path / "their" / "methods" / "halved.toml").write_text(line + "\n")
    listed = papertrl(tmp_path, "methods")
    assert part in listed.stderr and listed.stderr.count("\n") == 1 and "'their-methods'" in listed.stderr
