import json

import pytest

from papertrl import cli
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


def test_recipes_parse():
    from pathlib import Path

    import papertrl.recipes

    for recipe in Path(papertrl.recipes.__file__).parent.glob("*.yaml"):
        choice = choose(["--config", recipe.stem, "--output_dir", "x"])
        for one in choice.stages or [choice]:
            assert parse(one).methods, recipe


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


@pytest.mark.parametrize(
    "text, part",
    [("- a\n- b\n", "must hold a mapping"), ("a: [\n", "not valid YAML"), ("lerning_rate: 1\n", "learning_rate")],
)
def test_wrong_config_files(text, part, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    with pytest.raises(UsageError, match=part):
        job("--config", str(config))


def test_help_and_lists(capsys):
    assert cli.main(["train", "--help"]) == 0
    assert "--method NAME" in capsys.readouterr().out
    assert cli.main(["train", "--list_methods"]) == 0
    listed = capsys.readouterr().out
    assert cli.main(["methods"]) == 0
    assert capsys.readouterr().out == listed
    from papertrl.core.catalogue import METHODS, load_trainer

    for name in METHODS:
        trainer = load_trainer(name)
        assert (
            trainer.method.summary in listed and trainer._paper["title"] in listed and trainer._paper["id"] in listed
        )
    assert cli.main(["train", "--method", "dler", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("arXiv:2510.15110") < text.index("--dler_truncation_length") < text.index("--learning_rate")
    assert cli.main(["nothing"]) == 2


def test_help_and_lists_do_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys; from papertrl.cli import main; main(['train', '--help']); main(['train', '--list_methods']);"
        "main(['train', '--method', 'x']); assert 'torch' not in sys.modules and 'trl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
