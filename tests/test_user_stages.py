"""A plain function in a stage of any trainer."""

import pytest
import torch

from papertrl import LpRegGRPOTrainer, PolicyTrainer, PreferenceTrainer, SupervisedTrainer, compose
from papertrl.core.catalogue import load

from .harness.table import active_config, build, logged, model_path, settings, weights


def run(trainer_class, request, tmp_path, stages, names=(), **values):
    args = active_config(trainer_class, names, tmp_path, max_steps=2, **values)
    model = model_path(trainer_class.family, request)
    trainer = build(trainer_class, trainer_class.family, model, args, stages=stages)
    trainer.train()
    return trainer


def halved(default):
    return default / 2


def centered_alone(rewards, centered):
    """Advantages that nobody scales."""
    return centered


def same(first, second):
    first, second = weights(first), weights(second)
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_function_takes_the_place_of_the_base(request, tmp_path):
    ours = run(PolicyTrainer, request, tmp_path / "ours", {"scale": centered_alone})
    theirs = run(PolicyTrainer, request, tmp_path / "theirs", None, scale_rewards="none")
    assert same(ours, theirs)
    assert not same(ours, run(PolicyTrainer, request, tmp_path / "plain", None))


def test_a_function_acts_on_what_the_others_came_to(request, tmp_path):
    seen = []

    def doubled(default, scored, trainer):
        seen.append((default.clone(), scored.group_ids, trainer))
        return default * 2

    trainer = run(PolicyTrainer, request, tmp_path, {"scale": doubled})
    assert seen and all(given[2] is trainer for given in seen)
    assert all(given[0].shape == given[1].shape for given in seen)


def test_extenders_of_methods_stay_around_a_function_that_replaces(request, tmp_path):
    class Counted(LpRegGRPOTrainer):
        calls = 0

        def scale(self, scored, rewards, centered):
            Counted.calls += 1
            return super().scale(scored, rewards, centered)

    run(Counted, request, tmp_path, {"scale": centered_alone}, ["lp_reg"])
    assert Counted.calls > 0


def test_preference_and_supervised_stages_take_functions(request, tmp_path):
    plain = run(PreferenceTrainer, request, tmp_path / "a", None)
    ours = run(PreferenceTrainer, request, tmp_path / "b", {"margin": halved})
    assert logged(ours, "rewards/optimized_margins")[-1] != logged(plain, "rewards/optimized_margins")[-1]
    plain = run(SupervisedTrainer, request, tmp_path / "c", None)
    ours = run(SupervisedTrainer, request, tmp_path / "d", {"token_weights": lambda default: default * 0})
    assert logged(ours, "loss")[0] == 0 != logged(plain, "loss")[0]


def test_a_dotted_path_names_a_function(request, tmp_path):
    ours = run(PolicyTrainer, request, tmp_path / "a", {"scale": f"{__name__}.centered_alone"})
    assert same(ours, run(PolicyTrainer, request, tmp_path / "b", {"scale": centered_alone}))


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({"brew": halved}, ValueError, "names 'brew', which PolicyTrainer does not have"),
        ({"scale": lambda advantages: advantages}, ValueError, r"parameters \['advantages'\], but the stage has"),
        ({"scale": 3}, TypeError, r"`stages\['scale'\]` must be a function, got `int`"),
        ({"scale": "papertrl.nothing.like_it"}, ValueError, "no function 'papertrl.nothing.like_it'"),
        ({"scale": "papertrl.__version__"}, ValueError, "is no function, but a str"),
        ({"scale": dict}, TypeError, r"`stages\['scale'\]` must be a function, got `type`"),
        ({"scale": lambda centered, /: centered}, ValueError, r"parameters \['centered'\].*by name"),
        ([("scale", halved)], TypeError, "`stages` must map stages to functions, got `list`"),
    ],
)
def test_what_is_no_function_of_the_stage_is_refused_at_construction(stages, error, message, request, tmp_path):
    args = PolicyTrainer.config_class(**settings("policy", tmp_path))
    with pytest.raises(error, match=message):
        build(PolicyTrainer, "policy", model_path("policy", request), args, stages=stages)


def test_a_result_of_another_shape_is_refused(request, tmp_path):
    def per_group(rewards, centered):
        return centered.view(-1, 4).mean(1)

    with pytest.raises(ValueError, match=r"'.*per_group' of the stage 'scale' must return a tensor of shape \(8,\)"):
        run(PolicyTrainer, request, tmp_path, {"scale": per_group})


def test_a_parameter_with_a_default_value_is_the_functions_own(request, tmp_path):
    ours = run(PolicyTrainer, request, tmp_path / "a", {"scale": lambda default, by=2: default / by})
    assert same(ours, run(PolicyTrainer, request, tmp_path / "b", {"scale": halved}))


def test_a_default_value_does_not_keep_an_argument_of_the_stage_away(request, tmp_path):
    def ours(default=None, rewards=None, **rest):
        assert rewards is not None and rest.keys() == {"scored", "centered"}
        return default / 2

    acting = run(PolicyTrainer, request, tmp_path / "a", {"scale": ours})
    assert same(acting, run(PolicyTrainer, request, tmp_path / "b", {"scale": halved}))


def test_a_function_does_not_hide_a_component(request, tmp_path):
    trainer_class = compose("grpo", "gain_rl")
    args = active_config(trainer_class, ["gain_rl"], tmp_path)

    def first(count, round):
        return list(range(count))

    with pytest.raises(ValueError, match=r"`stages\['choose_prompts'\]`: component 'gain_rl' acts in this stage"):
        build(trainer_class, "policy", model_path("policy", request), args, stages={"choose_prompts": first})


def test_a_function_and_a_method_do_not_both_replace(request, tmp_path):
    trainer_class = compose("lite_ppo", "lp_reg")
    args = active_config(trainer_class, ["lp_reg"], tmp_path)
    with pytest.raises(ValueError, match=r"'lite_ppo' replaces the stage 'scale'.*`default`"):
        build(trainer_class, "policy", model_path("policy", request), args, stages={"scale": centered_alone})
    run(trainer_class, request, tmp_path / "on_top", {"scale": halved}, ["lp_reg"])


def test_the_base_takes_no_function_for_what_is_no_stage():
    assert "training_step" not in {f for functions in load("grpo").stages.values() for f in functions}
