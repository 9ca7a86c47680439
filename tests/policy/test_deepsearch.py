"""DeepSearch: its values against plain loops, and what a real run searches, trains on and replays."""

import json
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from papertrl import DeepsearchGRPOConfig, DeepsearchGRPOTrainer, DlerGRPOTrainer, PolicyTrainer, compose
from papertrl.core.catalogue import DECLARATIONS
from papertrl.losses.policy.deepsearch import back_up, node_advantages, overlong_penalty, spread_nodes
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import checksum, distributions, gradients, make, metric, run, sampled
from ..harness.table import active_config, dataset, settings, weights
from .test_vllm import FakeClient, train

number = st.floats(-3, 3, allow_subnormal=False)


def backed_up_by_hand(values, reward, floor):
    """q of every node of a path, root first."""
    found = []
    for i, q in enumerate(values):
        weight = max(i / (len(values) - 1), floor)
        if q * reward >= 0:
            found.append(q + weight * reward)
        elif reward > 0:
            found.append(weight * reward)
        else:
            found.append(q)
    return found


@given(
    st.lists(st.just(0.0) | number, min_size=2, max_size=9), st.sampled_from([-1.0, -0.3, 0.0, 1.0]), st.floats(0, 1)
)
def test_rewards_are_backed_up_with_decay_and_right_ones_win(values, reward, floor):
    found = back_up(torch.tensor(values, dtype=torch.float64), reward, floor)
    assert found.tolist() == pytest.approx(backed_up_by_hand(values, reward, floor))


def advantages_by_hand(rows, temperature, maximum, normalization):
    """Advantages of nodes, from rows of q."""
    ends = [row[-1] for row in rows]
    mean = sum(ends) / len(ends)
    std = math.sqrt(sum((x - mean) ** 2 for x in ends) / len(ends))
    found = []
    for row in rows:
        clipped = [maximum * math.tanh(q / temperature) for q in row[:-1]] + row[-1:]
        if normalization != "none":
            clipped = [q - mean for q in clipped]
        if normalization == "sibling_mean_std" and std > 0:
            clipped = [q / (std + 1e-6) for q in clipped]
        found.append(clipped)
    return found


def padded(rows, fill=0.0):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.float64)


trees = st.lists(
    st.tuples(st.lists(number, max_size=4), st.sampled_from([-1.0, -0.5, 1.0])).map(lambda row: [*row[0], row[1]]),
    min_size=1,
    max_size=5,
)


@given(trees, st.floats(0.2, 3), st.floats(0.2, 2), st.sampled_from(["sibling_mean", "sibling_mean_std", "none"]))
def test_advantages_of_nodes(rows, temperature, maximum, normalization):
    lengths = padded([[2] * len(row) for row in rows]).long()
    expected = advantages_by_hand(rows, temperature, maximum, normalization)
    for fill in (0.0, 1e3):
        found = node_advantages(padded(rows, fill), lengths, temperature, maximum, normalization)
        torch.testing.assert_close(found, padded(expected))


@pytest.mark.parametrize("normalization", ["sibling_mean", "sibling_mean_std", "none"])
@pytest.mark.parametrize("reward", [-1.0, 1.0])
def test_advantages_of_trees_without_variance_are_finite_and_of_order_one(reward, normalization):
    values = torch.tensor([[reward, reward], [50 * reward, reward]])
    found = node_advantages(values, torch.ones(2, 2).long(), 1.0, 1.0, normalization)
    assert found.abs().max() <= 2
    single = node_advantages(values[:1, 1:], torch.ones(1, 1).long(), 1.0, 1.0, normalization)
    assert single.item() == (reward if normalization == "none" else 0.0)


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 12))
def test_every_token_has_the_value_of_its_node(lengths, extra):
    values = [[10.0 * i + j for j in range(len(row))] for i, row in enumerate(lengths)]
    time = max(map(sum, lengths)) + extra
    found = spread_nodes(padded(values, 99.0), padded(lengths).long(), time).tolist()
    for row, nodes, tokens in zip(found, values, lengths, strict=True):
        expected = [value for value, count in zip(nodes, tokens, strict=True) for _ in range(count)]
        assert row == expected + [0.0] * (time - len(expected))


# --- The trainer ------------------------------------------------------------------------------------------------

SEARCH = {
    **DECLARATIONS["deepsearch"].active,
    "num_generations": 4,
    "per_device_train_batch_size": 6,
    "tree_overlong_share": 0.0,
}


def dumped(folder):
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def ancestry(nodes, place):
    """Nodes of a dumped tree from the root to one of them."""
    line = [nodes[place]]
    while line[-1]["parent"] is not None:
        line.append(nodes[line[-1]["parent"]])
    return line[::-1]


def kept(tree):
    """Places of a dumped tree's trajectories, in order."""
    places = [i for i, node in enumerate(tree["nodes"]) if node["returned"] is not None]
    return sorted(places, key=lambda i: tree["nodes"][i]["returned"])


def values_by_hand(tree):
    """q of every node, from the rewards of the kept trajectories alone."""
    nodes = tree["nodes"]
    index = {id(node): i for i, node in enumerate(nodes)}
    q = [0.0] * len(nodes)
    for place in kept(tree):
        line = [index[id(node)] for node in ancestry(nodes, place)]
        new = backed_up_by_hand([q[i] for i in line], nodes[place]["reward"], 0.1)
        for i, value in zip(line, new, strict=True):
            q[i] = value
    return q


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "generate"])
def test_what_a_run_searches_and_trains_on(fast, policy_path, tmp_path):
    options = SEARCH | {"max_steps": 3, "tree_dump_dir": str(tmp_path / "trees"), "tree_dump_steps": 1}
    options |= {"fast_rollouts": fast, "tree_replay_accuracy_max": None}
    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, **options)
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    dumps = dumped(tmp_path / "trees")
    assert [dump["step"] for dump in dumps] == [0, 1, 2]
    seen = {"depth": 0, "nodes": 0, "right": 0}
    for dump, (scored, batch, model, _) in zip(dumps, trainer.generations, strict=True):
        logps = sampled(distributions(model, batch), batch)
        assert len(dump["trees"]) == 3
        for group, tree in enumerate(dump["trees"]):
            q = values_by_hand(tree)
            assert [node["q"] for node in tree["nodes"]] == pytest.approx(q)
            rows = [ancestry(tree["nodes"], place)[1:] for place in kept(tree)]
            expected = advantages_by_hand([[node["q"] for node in row] for row in rows], 1.0, 1.0, "sibling_mean")
            for place, (nodes, advantages) in enumerate(zip(rows, expected, strict=True)):
                row = 4 * group + place
                time = int(batch["completion_mask"][row].sum())
                ids = batch["completion_ids"][row, :time].tolist()
                # The step length is two tokens, and only the last step may be shorter
                assert [node["tokens"] for node in nodes[:-1]] == [2] * (len(nodes) - 1)
                assert sum(node["tokens"] for node in nodes) == time <= 8
                assert "".join(node["text"] for node in nodes) == tokenizer.decode(ids)
                text = tokenizer.decode(ids, skip_special_tokens=True)
                assert nodes[-1]["reward"] == (1.0 if checksum([text]) == [1.0] else -1.0)
                assert scored.rewards[row].item() == (nodes[-1]["reward"] == 1.0)
                by_token = [a for a, node in zip(advantages, nodes, strict=True) for _ in range(node["tokens"])]
                assert batch["advantages"][row, :time].tolist() == pytest.approx(by_token, abs=1e-6)
                start = 0
                for node in nodes:
                    own = logps[row, start : start + node["tokens"]]
                    assert node["entropy"] == pytest.approx(-own.mean().item(), abs=1e-4)
                    start += node["tokens"]
                seen["depth"] = max(seen["depth"], len(nodes))
                seen["right"] += nodes[-1]["reward"] == 1.0
            seen["nodes"] += len(tree["nodes"])
        assert batch["source"].tolist() == [Source.POLICY] * 12
    assert seen["depth"] == 4 and seen["nodes"] > 60 and 0 < seen["right"] < 36
    trees = [tree for dump in dumps for tree in dump["trees"]]
    iterations = metric(trainer, "deepsearch/iterations")
    assert sum(iterations) == pytest.approx(sum(tree["iterations"] for tree in trees) / 3)
    tokens = metric(trainer, "deepsearch/tokens_per_trajectory")
    assert sum(tokens) == pytest.approx(sum(tree["sampled_tokens"] for tree in trees) / 12)
    right = metric(trainer, "deepsearch/correct_fraction")
    assert sum(right) == pytest.approx(seen["right"] / 12)
    assert trainer.generation_config.max_new_tokens == 8


def test_gradient_is_that_of_the_nodes_advantages(policy_path, tmp_path):
    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, **(SEARCH | {"max_steps": 1}))
    _, batch, model, _ = trainer.generations[0]
    mask = batch["completion_mask"]
    logps = sampled(distributions(model, batch), batch)
    expected = gradients(-(logps * batch["advantages"] * mask).sum() / mask.sum(), model)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 2
    batches = [inputs for inputs, _, _ in trainer.micro_batches]
    total = sum(trainer._compute_loss(trainer.model, inputs) for inputs in batches)
    for name, gradient in gradients(total, trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


class Rare:
    """Reward 1 for the first of all completions that it sees of a prompt, and for the same text from then on."""

    __name__ = "rare"

    def __init__(self):
        self.right = {}

    def __call__(self, prompts, completions, **kwargs):
        pairs = list(zip(prompts, completions, strict=True))
        for prompt, text in pairs:
            self.right.setdefault(prompt, text)
        return [float(self.right[prompt] == text) for prompt, text in pairs]


def test_prompts_that_are_rarely_solved_are_replayed(policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6="]})
    options = SEARCH | {"max_steps": 2, "max_completion_length": 8, "temperature": 1.0, "shuffle_dataset": False}
    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, Rare(), data, **options)
    (first, one, _, rows), (second, two, _, _) = trainer.generations
    memory = trainer.method_state()["deepsearch"]
    for group in range(3):
        prompt = rows[4 * group]["prompt"]
        part = slice(4 * group, 4 * group + 4)
        right = first.rewards[part, 0] == 1
        assert (prompt in memory) == (int(right.sum()) == 1)
        if prompt not in memory:
            assert two["source"][part].tolist() == [Source.POLICY] * 4
            continue
        lengths = first.lengths[part].tolist()
        ids = [one["completion_ids"][4 * group + i, : lengths[i]].tolist() for i in range(4) if right[i]]
        assert memory[prompt] == ids
        # It comes first in the group, next to completions that were sampled directly
        assert two["completion_ids"][4 * group, : len(ids[0])].tolist() == ids[0]
        assert two["source"][part].tolist() == [Source.REPLAY] + [Source.POLICY] * 3
        rewards = 2 * second.rewards[part, 0] - 1
        for i in range(4):
            time = int(two["completion_mask"][4 * group + i].sum())
            wanted = [(rewards[i] - rewards.mean()).item()] * time
            assert two["advantages"][4 * group + i, :time].tolist() == pytest.approx(wanted, abs=1e-6)
    assert memory
    cached = metric(trainer, "deepsearch/cached_prompt_fraction")
    assert cached == [0.0, pytest.approx(len(memory) / 3)]


def test_nothing_is_replayed_without_a_bound(policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6="]})
    options = SEARCH | {"max_steps": 2, "tree_replay_accuracy_max": None}
    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, Rare(), data, **options)
    assert trainer.method_state()["deepsearch"] == {}
    assert metric(trainer, "deepsearch/cached_prompt_fraction") == [0.0, 0.0]


def test_a_prompt_that_is_solved_leaves_the_replay(policy_path, tmp_path):
    """It comes in for its one right answer, and is searched again once its new answers are right."""
    rare = Rare()

    def turning(prompts, completions, trainer_state, **kwargs):
        return [1.0] * len(prompts) if trainer_state.global_step > 0 else rare(prompts, completions)

    data = Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6="]})
    options = SEARCH | {"max_steps": 3, "max_completion_length": 8, "temperature": 1.0}
    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, turning, data, **options)
    before, replayed, after = metric(trainer, "deepsearch/cached_prompt_fraction")
    assert before == 0.0 and replayed > 0 and after == 0.0
    assert trainer.method_state()["deepsearch"] == {}


def test_other_rewards_do_not_decide_which_completions_are_right(policy_path, tmp_path):
    def tax(completions, **kwargs):
        return [-2.0 if len(text) % 2 else 0.25 for text in completions]

    found = []
    for rewards, name in (([checksum], None), ([checksum, tax], None), ([tax, checksum], "checksum")):
        options = SEARCH | {"max_steps": 1, "tree_correctness_reward": name}
        trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path / f"{len(found)}", rewards, **options)
        found.append((trainer.generations[0][1], metric(trainer, "deepsearch/correct_fraction")))
    for batch, right in found[1:]:
        assert torch.equal(batch["completion_ids"], found[0][0]["completion_ids"])
        assert torch.equal(batch["advantages"], found[0][0]["advantages"]) and right == found[0][1]
    assert 0 < found[0][1][0] < 1
    # Partial credit up to `success_threshold` is no right answer
    half = run(
        DeepsearchGRPOTrainer,
        policy_path,
        tmp_path / "half",
        lambda completions, **kwargs: [0.5] * len(completions),
        **SEARCH | {"max_steps": 1, "success_threshold": 0.5},
    )
    assert metric(half, "deepsearch/correct_fraction") == [0.0]


def test_the_correctness_reward_is_known_and_told(policy_path, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"`tree_correctness_reward` must be one of \['checksum'\], got 'other'"):
        make(DeepsearchGRPOTrainer, policy_path, tmp_path, **SEARCH, tree_correctness_reward="other")
    make(DeepsearchGRPOTrainer, policy_path, tmp_path, [checksum, Rare()], **SEARCH)
    assert (
        "by the first of the rewards ['checksum', 'Rare'], 'checksum'" in caplog.text
        or "'checksum'. Name" in caplog.text
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_overlong_penalty(lengths, share):
    found = overlong_penalty(torch.tensor(lengths), 40, share)
    for length, penalty in zip(lengths, found.tolist(), strict=True):
        begins = 40 * (1 - share)
        assert penalty == pytest.approx(-(length - begins) / (40 * share) if share and length > begins else 0.0)


def test_long_trajectories_lose_value(policy_path, tmp_path):
    """Every token's score is lowered before the mean over the tree is taken."""
    plain, taxed = (
        run(
            DeepsearchGRPOTrainer,
            policy_path,
            tmp_path / str(share),
            **SEARCH | {"max_steps": 1, "tree_overlong_share": share},
        )
        for share in (0.0, 0.5)
    )
    one, two = plain.generations[0][1], taxed.generations[0][1]
    assert torch.equal(one["completion_ids"], two["completion_ids"])
    penalties = overlong_penalty(one["completion_mask"].sum(1), 8, 0.5).view(-1, 4)
    assert penalties.min() < 0 and penalties.max() > penalties.min()
    shift = (penalties - penalties.mean(1, keepdim=True)).flatten().unsqueeze(1)
    mask = one["completion_mask"]
    torch.testing.assert_close(two["advantages"] * mask, (one["advantages"] + shift) * mask)


def test_rows_without_a_reward_have_no_advantage(policy_path, tmp_path):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, nothing, **(SEARCH | {"max_steps": 2}))
    assert metric(trainer, "loss") == [0.0, 0.0] and metric(trainer, "grad_norm") == [0.0, 0.0]
    assert metric(trainer, "deepsearch/correct_fraction") == [0.0, 0.0]


def test_refilled_groups_keep_the_advantages_of_their_trees(policy_path, tmp_path):
    """DLER moves whole groups; unfilled places have no advantage."""
    trainer_class = compose(DeepsearchGRPOTrainer, DlerGRPOTrainer)
    options = SEARCH | {"max_steps": 3, "dler_max_resample_batches": 1, "dler_truncation_length": 8}
    trainer = run(trainer_class, policy_path, tmp_path, **options)
    assert max(metric(trainer, "groups/refill_rounds")) > 0
    checked = 0
    for scored, batch, _, rows in trainer.generations:
        for i, row in enumerate(rows):
            nodes = row["deepsearch_nodes"]
            assert sum(nodes["lengths"]) == int(batch["completion_mask"][i].sum())
            by_token = [a for a, n in zip(nodes["advantages"], nodes["lengths"], strict=True) for _ in range(n)]
            wanted = by_token if bool(scored.usable[i]) else [0.0] * len(by_token)
            assert batch["advantages"][i, : len(by_token)].tolist() == pytest.approx(wanted, abs=1e-6)
            checked += any(by_token)
    assert checked > 10


def test_evaluation_does_not_search(policy_path, tmp_path):
    trainer = make(DeepsearchGRPOTrainer, policy_path, tmp_path, **SEARCH, per_device_eval_batch_size=8)
    assert math.isfinite(trainer.evaluate(dataset("policy").select(range(4)))["eval_loss"])
    for scored, batch, _, _ in trainer.generations:
        assert torch.equal(batch["advantages"], scored.advantages)


class StepClient(FakeClient):
    """Stops after as many tokens as TRL's client is set to."""

    max_completion_length = 8

    def generate(self, prompts, images, num_generations, profiler):
        # What it answers depends on the place among `num_generations` rows of a prompt
        _, ids, logps, _ = super().generate(prompts, images, 10**6, profiler)
        self.lengths = [*getattr(self, "lengths", []), self.max_completion_length]
        return None, *([row[: self.max_completion_length] for row in rows] for rows in (ids, logps)), None


def test_vllm_samples_the_steps(policy_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.policy.test_vllm.FakeClient", StepClient)
    args = active_config(DeepsearchGRPOTrainer, ["deepsearch"], tmp_path)
    trainer = train(DeepsearchGRPOTrainer, args, policy_path)
    client = trainer.vllm_generation
    assert set(client.lengths) <= {2, 8} and 2 in client.lengths and client.max_completion_length == 8
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert min(metric(trainer, "deepsearch/iterations")) >= 1
    assert all(math.isfinite(value) for value in metric(trainer, "sampling/importance_sampling_ratio/mean"))


def test_verifying_leaves_no_trace(policy_path, tmp_path):
    """What the search asks of reward functions is not in the batch's metrics, columns or token counts."""

    def telling(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(text) for text in completions])
        log_metric("asked", float(len(completions)))
        return checksum(completions)

    trainer = run(DeepsearchGRPOTrainer, policy_path, tmp_path, telling, **(SEARCH | {"max_steps": 2}))
    assert metric(trainer, "asked") == [12.0, 12.0]
    mean_length = [(batch["completion_mask"].sum(1).float().mean().item()) for _, batch, _, _ in trainer.generations]
    assert metric(trainer, "completions/mean_length") == pytest.approx(mean_length)
    seen = sum(int(b["completion_mask"].sum() + b["prompt_mask"].sum()) for _, b, _, _ in trainer.generations)
    assert trainer.state.num_input_tokens_seen == seen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tree_width": 1}, r"`tree_width` must be a number in \[2, inf\) or None, got 1"),
        ({"tree_max_depth": 0}, r"`tree_max_depth` must be a number in \[1, inf\), got 0"),
        ({"tree_selection": "global"}, "`tree_selection` must be one of 'frontier', 'uct', got 'global'"),
        ({"tree_lambda_uct": -1.0}, r"`tree_lambda_uct` must be a number in \[0, inf\)"),
        *[
            ({f"tree_lambda_{name}": math.nan}, f"`tree_lambda_{name}` must be a number")
            for name in ("quality", "uncertainty", "depth", "self")
        ],
        ({"tree_depth_bonus": "constant"}, "`tree_depth_bonus` must be one of 'sqrt', 'log', 'linear', got"),
        ({"tree_gamma_min": 1.5}, r"`tree_gamma_min` must be a number in \[0, 1\], got 1.5"),
        ({"tree_incomplete_score": -2.0}, r"`tree_incomplete_score` must be a number in \[-1, 1\], got -2.0"),
        ({"tree_overlong_share": 1.5}, r"`tree_overlong_share` must be a number in \[0, 1\], got 1.5"),
        ({"tree_q_temperature": 0.0}, r"`tree_q_temperature` must be a number in \(0, inf\), got 0.0"),
        ({"tree_q_max": 0.0}, r"`tree_q_max` must be a number in \(0, inf\), got 0.0"),
        ({"tree_adv_norm": "mean"}, "`tree_adv_norm` must be one of 'sibling_mean', 'sibling_mean_std', 'none'"),
        (
            {"tree_replay_accuracy_max": 0.0},
            r"`tree_replay_accuracy_max` must be a number in \(0, 1\] or None, got 0.0",
        ),
        ({"tree_dump_steps": 0}, r"`tree_dump_steps` must be a number in \[1, inf\), got 0"),
        ({"generation_kwargs": {"stop_strings": ["."]}}, "leave `stop_strings` out .*tree_width=None"),
        ({"generation_kwargs": {"stop": ["."]}, "use_vllm": True}, "leave `stop` out .*tree_width=None"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DeepsearchGRPOConfig(**settings("policy", tmp_path, **values))


def test_other_ways_to_roll_out_are_refused(policy_path, tmp_path):
    args = active_config(DeepsearchGRPOTrainer, ["deepsearch"], tmp_path)

    def build(**kwargs):
        return DeepsearchGRPOTrainer(policy_path, [checksum], args, train_dataset=dataset("policy"), **kwargs)

    with pytest.raises(ValueError, match="Leave `rollout_func` out, or set `tree_width=None`"):
        build(rollout_func=lambda prompts, trainer: {})
    with pytest.raises(ValueError, match=r"Methods \['deepsearch'\].*`tools`"):
        build(tools=[lambda: None])


def test_the_base_completes_what_is_there_already(policy_path, tmp_path):
    trainer = make(PolicyTrainer, policy_path, tmp_path)
    trainer.model.train()
    rows = list(dataset("policy").select(range(2)))
    prompts = [row["prompt"] for row in rows]
    generation = trainer.complete(rows, prompts, [[5, 6], [7]], [[8, 9], [10]], [[-1.0, -2.0], [None]])
    assert generation.completion_ids == [[8, 9], [10]] and generation.sampling_logps == [[-1.0, -2.0], [None]]
    assert generation.completions == trainer.processing_class.batch_decode([[8, 9], [10]])
    assert trainer.rollout_func is None
