"""Config files: what people write into them, and what they are told of it."""

import pytest

from papertrl import cli
from papertrl.core.errors import UsageError
from papertrl.job.arguments import choose, parse


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Job of a config file with the given text."""
    monkeypatch.chdir(tmp_path)

    def job(text, *argv):
        (tmp_path / "mine.yaml").write_text(text)
        return parse(choose(["--config", "mine.yaml", "--output_dir", "x", *argv]))

    return job


def test_values_are_of_the_type_of_their_flag(config):
    job = config(
        "learning_rate: 1e-5\nmax_steps: '7'\nwarmup_steps: 5.0\nreward_funcs: exact_match\nreward_weights: 0.5\n"
        "lora_target_modules: all-linear\nlogging_first_step: yes\ndisable_tqdm: 'off'\neval_strategy: no\n"
        "report_to: none\nscale_rewards: false\nmin_p: null\nrun_name: 2024\nmodel_init_kwargs: {dtype: float32}\n"
        "use_peft: on\nepsilon_high: none\n"
    )
    training = job.training
    assert (training.learning_rate, training.max_steps, training.reward_weights) == (1e-5, 7, [0.5])
    assert job.arguments.reward_funcs == ["exact_match"] and job.model.lora_target_modules == "all-linear"
    assert (training.logging_first_step, training.disable_tqdm, job.model.use_peft) == (True, False, True)
    assert training.eval_strategy == "no" and training.report_to == [] and training.scale_rewards == "none"
    assert training.min_p is None and training.run_name == "2024" and training.epsilon_high is None
    assert training.model_init_kwargs == {"dtype": "float32"}


@pytest.mark.parametrize(
    "text, parts",
    [
        ("- a\n- b\n", ["must hold a mapping", "got a list"]),
        ("just words\n", ["must hold a mapping", "'just words'"]),
        ("", ["is empty"]),
        ("# nothing yet\n", ["is empty"]),
        ("a: [\n", ["not valid YAML"]),
        ("method: dler\n\tmax_steps: 3\n", ["not valid YAML", "tab"]),
        ("3: x\n", ["has the key 3"]),
        ("lerning_rate: 1\n", ["`lerning_rate`", "Did you mean learning_rate"]),
        ("max_steps: 3\nbeta: 0.1\nmax_steps: 4\n", ["key `max_steps` twice", "line 1", "line 3"]),
        ("task_kwargs: {digits: 1, digits: 2}\n", ["key `digits` twice"]),
        ("learning_rate: fast\n", ["`learning_rate`", "a number", "'fast'"]),
        ("learning_rate: [1, 2]\n", ["`learning_rate`", "a number", "[1, 2]"]),
        ("learning_rate:\n", ["`learning_rate`", "a number", "nothing"]),
        ("max_steps: 2.5\n", ["`max_steps`", "an integer", "2.5"]),
        ("max_steps: true\n", ["`max_steps`", "an integer", "True"]),
        ("max_steps: 1e26\n", ["`max_steps`", "[1, 1000000000]"]),
        ("max_steps: .inf\n", ["`max_steps`", "an integer"]),
        ("use_peft: maybe\n", ["`use_peft`", "true or false", "'maybe'"]),
        ("reward_weights: [1, heavy]\n", ["`reward_weights`", "a number", "'heavy'"]),
        ("reward_funcs: {exact_match: 1}\n", ["`reward_funcs`", "text"]),
        ("output_dir: yes\n", ["`output_dir`", "in quotes", "True"]),
        ("save_strategy: sometimes\n", ["`save_strategy`", "'epoch'", "'sometimes'"]),
        ("task_kwargs: 3\n", ["`task_kwargs`", "a mapping"]),
        ("lora_dropout: 1.5\n", ["`lora_dropout`", "[0, 1)"]),
        ("held_out_prompts: -5\n", ["`held_out_prompts`", "[0, 1000000]", "-5"]),
        ("task_size: 1000000000\n", ["`task_size`", "[1, 1000000]"]),
        ("start_model_error_share: 1.5\n", ["`start_model_error_share`", "[0, 1]"]),
        ("env: [a]\n", ["`env`", "mapping"]),
        ("stages: []\n", ["`stages`", "a list with one mapping", "[]"]),
        ("stages:\n", ["`stages`", "a list with one mapping", "None"]),
        ("stages: {method: sft}\n", ["`stages`", "a list with one mapping"]),
        ("method: 3\n", ["`methods`", "names of methods", "[3]"]),
        ("methods: [dler, [lp_reg]]\n", ["`methods`", "names of methods"]),
    ],
)
def test_wrong_config_files(text, parts, config):
    with pytest.raises(UsageError) as error:
        config(text)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name, part", [("", "no file and no recipe"), (".", "is a folder"), ("dlr", "Did you mean")])
def test_config_files_that_are_none(name, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", name]) == 2
    assert part in capsys.readouterr().err


def test_a_method_in_place_of_the_recipes(config):
    with pytest.raises(UsageError) as error:
        parse(choose(["--method", "lp_reg", "--config", "dler"]))
    for part in ("settings of dler", "puts lp_reg", "`dler_", "--methods dler lp_reg"):
        assert part in str(error.value)
    # Settings that both have are no trouble
    assert config("method: dler\nmax_steps: 3\n", "--method", "lp_reg").methods == ["lp_reg"]
