import json

import pytest

from papertrl import cli
from papertrl.core.catalogue import DECLARATIONS, METHODS
from papertrl.core.declaration import Method
from papertrl.core.errors import UsageError
from papertrl.job.arguments import choose, parse


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def job(*argv):
    return parse(choose(list(argv)))


def test_embedded_settings_apply_without_a_model_only(tmp_path):
    tiny = job("--output_dir", str(tmp_path))
    assert tiny.methods == ["lp_reg"]
    assert tiny.training.per_device_train_batch_size == 256 and tiny.training.max_completion_length == 5
    real = job("--output_dir", str(tmp_path), "--model_name_or_path", "some/model")
    fields = real.trainer_class.config_class.__dataclass_fields__
    assert real.training.max_completion_length == fields["max_completion_length"].default > 5


def test_command_line_beats_config_beats_embedded_settings(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("method: dler\nlearning_rate: 2e-4\nmax_steps: 7\ntask_size: 50\n")
    parsed = job("--config", str(config), "--max-steps", "9", "--output_dir", str(tmp_path))
    assert parsed.methods == ["dler"]
    assert (parsed.training.learning_rate, parsed.training.max_steps) == (2e-4, 9)
    assert parsed.arguments.task_size == 50
    assert parsed.training.num_generations == 8


def test_methods_on_the_command_line_replace_those_of_the_config(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("methods: [dler, gain_rl]\n")
    assert choose(["--config", str(config)]).methods == ["dler", "gain_rl"]
    assert choose(["--config", str(config), "--method", "Lp-Reg"]).methods == ["lp_reg"]


def test_composed_config_has_the_fields_of_all_methods(tmp_path):
    parsed = job(
        "--methods", "lp_reg", "d3s", "--lp_reg_beta", "0.5", "--d3s_scope", "intra_group", "--output_dir", "x"
    )
    assert parsed.training.lp_reg_beta == 0.5 and parsed.training.d3s_scope == "intra_group"
    assert parsed.trainer_class.__name__ == "LpRegD3sGRPOTrainer"


def test_flags_without_value_and_json(tmp_path):
    parsed = job("--disable_tqdm", "--use_peft", "--task_kwargs", json.dumps({"digits": 3}), "--output_dir", "x")
    assert parsed.training.disable_tqdm is True and parsed.model.use_peft is True
    assert parsed.arguments.task_kwargs == {"digits": 3}


def test_recipes_parse(capsys):
    from pathlib import Path

    import papertrl.recipes

    for recipe in Path(papertrl.recipes.__file__).parent.glob("*.yaml"):
        choice = choose(["--config", recipe.stem, "--output_dir", "x"])
        for one in choice.stages or [choice]:
            assert parse(one).methods, recipe
    # No recipe has a field's earlier name
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--method", "lpreg"], ["Unknown method 'lpreg'", "'lp_reg'"]),
        (
            ["--methods", "lite_ppo", "dler"],
            ["'lite_ppo' and 'dler'", "stage 'scale'", "dler_advantage_whitening='none'"],
        ),
        (["--methods", "lp_reg", "rpo"], ["different families", "LpRegGRPOTrainer", "RpoDPOTrainer"]),
        (["--methods", "dler", "dler"], ["listed twice", "DlerGRPOTrainer"]),
        (["--method", "dler", "--methods", "lp_reg"], ["both given"]),
        (["--methods", "gain_rl", "rpo", "sft"], ["have no method"]),
        (
            ["--method", "dler", "--truncation_length", "4", "--dler_truncation_length=5"],
            ["given twice", "earlier name"],
        ),
        (["--stage", "scale"], ["`stage`", "NAME=module.function", "['scale']"]),
        (["--stage", "scale=a.b", "scale=a.c"], ["`stage` names a stage twice"]),
        (["--stage", "scale=nowhere.mine"], ["`stage`", "no function 'nowhere.mine'"]),
        (["--stage", "scael=math.exp"], ["names 'scael'", "LpRegGRPOTrainer", "'scale'"]),
        (["--method", "lite_ppo", "--stage", "scale=math.dist"], ["`stages['scale']`"]),
        (["--stage", "scale=math.pi"], ["'math.pi' is no function"]),
        (["--config", "no_such_recipe"], ["no file and no recipe"]),
        (["--lp_reg_bet", "1"], ["--lp_reg_bet", "Did you mean --lp_reg_beta"]),
        (["--lp_reg_beta", "-1"], ["`lp_reg_beta`", "-1", "[0, inf)"]),
        (["--lp_reg_beta", "much"], ["lp_reg_beta", "'much'"]),
        (["--lp_reg_filter", "top_p"], ["`lp_reg_filter`", "'min_p'", "'top_p'"]),
        (["--num_generations", "7"], ["num_generations (7)", "divisor of"]),
    ],
)
def test_wrong_command_lines(argv, parts, capsys):
    assert cli.main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("papertrl: ") and error.count("\n") == 1 and "Traceback" not in error
    for part in parts:
        assert part in error


def test_components_go_beside_objectives_and_plain_trainers():
    for methods, name in (
        (["grpo", "gain_rl"], "GainRlGRPOTrainer"),
        (["gain_rl"], "GainRlGRPOTrainer"),
        (["gain_rl", "lp_reg"], "LpRegGainRlGRPOTrainer"),
    ):
        parsed = job("--methods", *methods, "--gain_sigma", "0.5", "--output_dir", "x")
        assert parsed.trainer_class.__name__ == name and parsed.training.gain_sigma == 0.5
        assert [component.__name__ for component in parsed.trainer_class.components] == ["GainRl"]


def test_studies_are_refused_with_what_to_run(monkeypatch, capsys):
    monkeypatch.setitem(DECLARATIONS, "some_study", Method("some_study", kind="study", summary="Studies"))
    monkeypatch.setitem(METHODS, "some_study", "study")
    assert cli.main(["train", "--methods", "lp_reg", "some_study"]) == 2
    assert (
        "'some_study' is a study" in (error := capsys.readouterr().err)
        and "`python -m papertrl.labs.some_study`" in error
    )
    assert cli.main(["methods"]) == 0
    assert "Studies\n  some_study" in capsys.readouterr().out


def test_earlier_names_of_flags_and_keys(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("method: dler\ntruncation_length: 3\nmax_resample_batches: 1\n")
    given = ["--config", str(config), "--output_dir", "x", "--kl-estimator=k3", "--no_dynamic_sampling"]
    training = job(*given, "--truncation_length", "4").training
    assert (training.dler_truncation_length, training.dler_max_resample_batches) == (4, 1)
    assert (training.dler_kl_estimator, training.dler_dynamic_sampling) == ("k3", False)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5 and all(line.startswith("papertrl: `") and "is now called `" in line for line in told)
    assert "papertrl: `truncation_length` is now called `dler_truncation_length`; the old name goes" in told[0]
    config.write_text("method: dler\ntruncation_length: 3\ndler_truncation_length: 3\n")
    with pytest.raises(UsageError, match="`dler_truncation_length` is given twice: `truncation_length`"):
        job("--config", str(config))


def test_functions_of_the_user_by_flag_and_key(tmp_path, monkeypatch):
    (tmp_path / "my_job_stages.py").write_text("def mine(default):\n    return default / 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    by_flag = job("--stage", "scale=my_job_stages.mine", "baseline=my_job_stages.mine", "--output_dir", "x")
    assert by_flag.arguments.stage == {"scale": "my_job_stages.mine", "baseline": "my_job_stages.mine"}
    config = tmp_path / "mine.yaml"
    config.write_text("stage: {scale: my_job_stages.mine}\n")
    assert job("--config", str(config), "--output_dir", "x").arguments.stage == {"scale": "my_job_stages.mine"}
    config.write_text("stage: {scale: 3}\n")
    with pytest.raises(UsageError, match=r"NAME=module\.function"):
        job("--config", str(config), "--output_dir", "x")
    assert job("--output_dir", "x").arguments.stage is None


def test_help_and_lists(capsys):
    assert cli.main(["train", "--help"]) == 0
    assert "--method NAME" in capsys.readouterr().out
    assert cli.main(["train", "--list_methods"]) == 0
    listed = capsys.readouterr().out
    assert cli.main(["methods"]) == 0
    assert capsys.readouterr().out == listed
    for method in DECLARATIONS.values():
        assert f"  {method.name} " in listed
        assert method.summary in listed and f"{method.paper.title}, arXiv:{method.paper.id}" in listed
    for family in ("policy", "preference", "supervised"):
        assert f"Objectives of the family {family}" in listed
    assert listed.index("asft") < listed.index("Components of the slot prompts") < listed.index("gain_rl")
    assert cli.main(["train", "--method", "dler", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("arXiv:2510.15110") < text.index("--dler_truncation_length")
    assert "--learning_rate" not in text and "--method dler --help_all" in text
    assert cli.main(["train", "--method", "dler", "--help_all"]) == 0
    text = capsys.readouterr().out
    assert text.index("arXiv:2510.15110") < text.index("--dler_truncation_length") < text.index("--learning_rate")


def test_help_has_components_and_no_earlier_names(capsys):
    assert cli.main(["train", "--methods", "gain_rl", "dler", "--help_all"]) == 0
    text = capsys.readouterr().out
    own, rest = text.split("All flags of the job")
    assert own.index("arXiv:2510.15110") < own.index("--dler_truncation_length")
    assert own.index("arXiv:2506.02281") < own.index("--gain_sigma (default: 1000.0)")
    assert "--dler_truncation_length" in rest and "--gain_sigma" in rest and "--truncation_length" not in text


def test_help_and_lists_do_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys; from papertrl.cli import main; main(['train', '--help']); main(['train', '--list_methods']);"
        "main(['--version']); main(['methods', '--json']);"
        "main(['train', '--method', 'x']); main(['methods']); main(['train', '--methods', 'dler', 'lion', '--help']);"
        "assert 'torch' not in sys.modules and 'trl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
