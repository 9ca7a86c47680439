"""GAIN-RL: its signal against O(T²) loops over hidden states, and the curriculum of a real run."""

import math
import statistics

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from papertrl import DlerGRPOTrainer, GainRlGRPOConfig, GainRlGRPOTrainer, compose
from papertrl.losses.policy.gain_rl import mean_cross_cosine, mean_pairwise_cosine, prefill_signal

from ..harness.rollouts import checksum, make, metric, run
from ..harness.table import dataset, settings

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**31))


def draw(rows, time, seed):
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, time, 4, generator=g) * 10.0 ** torch.randint(-2, 3, (rows, time, 1), generator=g)
    first = (torch.rand(rows, time, generator=g) < 0.6).long()
    return vectors, first, (torch.rand(rows, time, generator=g) < 0.6).long() * (1 - first)


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def intra(vectors):
    pairs = [cosine(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i)]
    return statistics.fmean(pairs) if pairs else math.nan


def inter(left, right):
    pairs = [cosine(a, b) for a in left for b in right]
    return statistics.fmean(pairs) if pairs else 0.0


@given(shapes)
def test_pairwise_cosine(shape):
    vectors, mask, _ = draw(*shape)
    found = mean_pairwise_cosine(vectors, mask)
    for i in range(shape[0]):
        expected = intra(vectors[i][mask[i] == 1])
        assert found[i].item() == pytest.approx(expected, abs=1e-5, nan_ok=True)


@given(shapes, st.sampled_from([0.0, 1.0, 8.0]))
def test_signal(shape, weight):
    vectors, prefix, question = draw(*shape)
    cross = mean_cross_cosine(vectors, question, prefix)
    found = prefill_signal(vectors, prefix, question, weight)
    for i in range(shape[0]):
        left, right = vectors[i][question[i] == 1], vectors[i][prefix[i] == 1]
        assert cross[i].item() == pytest.approx(inter(left, right), abs=1e-5)
        expected = intra(left) + weight * inter(left, right)
        assert found[i].item() == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("value", [0.0, 1e6, math.inf, math.nan])
def test_padding_does_not_enter_whatever_it_holds(value):
    vectors, prefix, question = draw(3, 6, 5)
    expected = prefill_signal(vectors, prefix, question)
    outside = (prefix + question == 0).unsqueeze(-1)
    assert outside.any()
    changed = torch.where(outside, value, vectors)
    torch.testing.assert_close(prefill_signal(changed, prefix, question), expected, equal_nan=True)
    longer = torch.cat([torch.full((3, 2, 4), value), vectors], dim=1)
    pad = torch.zeros(3, 2, dtype=torch.long)
    found = prefill_signal(longer, torch.cat([pad, prefix], 1), torch.cat([pad, question], 1))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_degenerate_sequences():
    ones, none = torch.ones(1, 3), torch.zeros(1, 3)
    same = torch.ones(1, 3, 4)
    assert mean_pairwise_cosine(same, ones).item() == pytest.approx(1.0)
    assert mean_pairwise_cosine(torch.zeros(1, 3, 4), ones).item() == 0.0
    for mask in (none, torch.tensor([[1.0, 0.0, 0.0]])):
        assert mean_pairwise_cosine(same, mask).isnan().all()
    assert mean_cross_cosine(same, ones, none).item() == 0.0
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert mean_pairwise_cosine(opposite, torch.ones(1, 2)).item() == pytest.approx(-1.0)


def test_half_precision_vectors():
    vectors, mask, _ = draw(2, 6, 3)
    half = mean_pairwise_cosine(vectors.bfloat16(), mask)
    torch.testing.assert_close(half.float(), mean_pairwise_cosine(vectors, mask), atol=0.02, rtol=0)


# --- The trainer ------------------------------------------------------------------------------------------------

NARROW = {"gain_sigma": 1e-3, "gain_step": 3.0, "gain_shift_max": 50.0, "gain_beta": 0.3}


def mlp_inputs(model, ids):
    """Inputs of the last layer's MLP for one sequence without padding, from a hook of our own."""
    seen = []
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    model.eval()
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def order_by_hand(trainer, model, prompts, tokenize):
    signals = []
    for i, prompt in enumerate(prompts):
        vectors = mlp_inputs(model, tokenize(prompt))
        signals.append((-intra(vectors) if len(vectors) > 1 else math.inf, i))
    return [i for _, i in sorted(signals)]


def chosen(generation):
    scored = generation[0]
    return scored.prompt_indices[:: int((scored.group_ids == 0).sum())].tolist()


def nearest(order, mu, count):
    return {order[r] for r in sorted(range(len(order)), key=lambda r: abs(r - mu))[:count]}


def test_prompts_follow_the_order_and_the_window_moves_by_the_formula(policy_path, tokenizer, tmp_path):
    """With a narrow Gaussian the choice is known: the prompts nearest to μ, with no lag."""
    numbers = [(7 * i) % 97 for i in range(23)]
    prompts = [f"{n}*{n * n}={'+' * (i % 5)}" for i, n in enumerate(numbers)] + ["1"]
    data = Dataset.from_dict({"prompt": prompts})
    options = NARROW | {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_steps": 4}
    trainer = run(GainRlGRPOTrainer, policy_path, tmp_path, checksum, data, **options)
    assert len(trainer.generations) == 4
    order = order_by_hand(trainer, trainer.generations[0][2], prompts, lambda p: tokenizer(p)["input_ids"])
    # A prompt of one token has no angles
    assert order[-1] == 23
    mu, moved = 0.0, []
    for generation in trainer.generations:
        scored, batch, model, rows = generation
        assert set(chosen(generation)) == nearest(order, mu, 4)
        assert [prompts[i] for i in scored.prompt_indices.tolist()] == [row["prompt"] for row in rows]
        moved.append(mu)
        angles = []
        for i in range(16):
            ids = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1].tolist()
            ids += batch["completion_ids"][i][batch["completion_mask"][i] == 1].tolist()
            angles.append(intra(mlp_inputs(model, ids)))
        accuracy, angle = scored.rewards.mean().item(), statistics.fmean(angles)
        shift = 3.0 * math.tanh(2 * (accuracy - 0.3)) + 3.0 * math.tanh(2 * angle)
        mu = min(max(mu + min(max(shift, 0.0), 50.0), 0.0), 23.0)
    assert metric(trainer, "gain_rl/mu") == pytest.approx(moved, abs=1e-3)
    assert moved[1] > 0 and len(set(moved)) > 2
    assert trainer.slots.prompts()._curriculum.order.tolist() == order


def test_refilled_groups_come_from_the_same_window(policy_path, tmp_path):
    trainer_class = compose(GainRlGRPOTrainer, DlerGRPOTrainer)
    both = NARROW | {"gain_step": 1e-3, "beta": 0.0, "dler_max_resample_batches": 3, "per_device_train_batch_size": 8}
    trainer = run(trainer_class, policy_path, tmp_path, **both)
    order = trainer.slots.prompts()._curriculum.order.tolist()
    for generation in trainer.generations:
        assert set(generation[0].prompt_indices.tolist()) <= nearest(order, trainer.slots.prompts()._curriculum.mu, 5)
    assert max(metric(trainer, "groups/refill_rounds")) > 0


def test_left_padding_does_not_change_the_signal(policy_path, tmp_path):
    trainer = make(GainRlGRPOTrainer, policy_path, tmp_path)
    prompts = ["1+2=", "12345678*9=", "77-7", "3"]
    together = trainer.slots.prompts()._signals(prompts)
    alone = torch.cat([trainer.slots.prompts()._signals([p]) for p in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert together[3].isnan() and together[:3].isfinite().all()


TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '[be brief]' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '&' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CONVERSATIONS = [
    [{"role": "user", "content": "1+2?"}],
    [{"role": "system", "content": "add up"}, {"role": "user", "content": "5+6?"}],
    [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "2+2+2+2?"},
    ],
]
PREFIXES = ["[be brief]<user>", "<system>add up&<user>", "[be brief]<user>2+2?&<assistant>4&<user>"]
QUESTIONS = ["1+2?&", "5+6?&", "2+2+2+2?&"]


@pytest.fixture
def chat_tokenizer(policy_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat_trainer(path, tokenizer, output_dir, **values):
    args = GainRlGRPOConfig(**settings("policy", output_dir, **(NARROW | values)))
    data = Dataset.from_dict({"prompt": CONVERSATIONS * 4})

    def reward(completions, **kwargs):
        return checksum([message[0]["content"] for message in completions])

    return GainRlGRPOTrainer(path, [reward], args, train_dataset=data, processing_class=tokenizer)


def test_conversations_are_segmented_by_the_chat_template(policy_path, chat_tokenizer, tmp_path):
    """What the template adds before the question is prefix, the generation prompt is neither."""
    trainer = chat_trainer(policy_path, chat_tokenizer, tmp_path)
    for conversation, prefix, question in zip(CONVERSATIONS, PREFIXES, QUESTIONS, strict=True):
        ids, in_prefix, in_question = trainer.slots.prompts()._segments(conversation)

        def text(mask, ids=ids):
            return "".join(chat_tokenizer.convert_ids_to_tokens([i for i, m in zip(ids, mask, strict=True) if m]))

        assert (text(in_prefix), text(in_question)) == (prefix, question)
        assert text([1] * len(ids)) == prefix + question + "<assistant>"


@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_signal_of_a_conversation(weight, policy_path, chat_tokenizer, tmp_path):
    trainer = chat_trainer(policy_path, chat_tokenizer, tmp_path, gain_inter_weight=weight)
    found = trainer.slots.prompts()._signals(CONVERSATIONS)
    for value, prefix, question in zip(found.tolist(), PREFIXES, QUESTIONS, strict=True):
        ids = chat_tokenizer(prefix + question + "<assistant>", add_special_tokens=False)["input_ids"]
        vectors = mlp_inputs(trainer.model, ids)
        a, b = len(prefix), len(prefix) + len(question)
        assert value == pytest.approx(intra(vectors[a:b]) + weight * inter(vectors[a:b], vectors[:a]), abs=1e-4)


def test_conversations_train(policy_path, chat_tokenizer, tmp_path):
    trainer = chat_trainer(policy_path, chat_tokenizer, tmp_path, max_steps=2)
    trainer.train()
    assert all(math.isfinite(x) for x in metric(trainer, "loss")) and len(metric(trainer, "gain_rl/mu")) == 2


def test_accuracy_is_that_of_the_named_reward(policy_path, tmp_path):
    def style(completions, **kwargs):
        return [-3.0] * len(completions)

    def accuracy(completions, **kwargs):
        return [0.25] * len(completions)

    for name, expected in ((None, 0.0), ("accuracy", 0.25)):
        args = GainRlGRPOConfig(**settings("policy", tmp_path, **NARROW, gain_accuracy_reward=name, max_steps=1))
        trainer = GainRlGRPOTrainer(policy_path, [style, accuracy], args, train_dataset=dataset("policy"))
        trainer.train()
        assert metric(trainer, "gain_rl/accuracy") == [expected]


def test_unscored_rows_do_not_stop_the_curriculum(policy_path, tmp_path):
    trainer = run(
        GainRlGRPOTrainer, policy_path, tmp_path, lambda completions, **_: [None] * len(completions), **NARROW
    )
    assert all(math.isfinite(x) for x in metric(trainer, "gain_rl/mu"))


def test_shares_of_the_data(policy_path, tmp_path):
    values = {"gain_sigma": 0.25, "gain_step": 0.5, "gain_shift_max": 0.125, "max_steps": 1}
    sampler = run(GainRlGRPOTrainer, policy_path, tmp_path, **values).slots.prompts()._curriculum
    assert (sampler.sigma, sampler.step, sampler.shift_max) == (4.0, 8.0, 2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gain_sigma": 0.0}, r"`gain_sigma` must be a number in \(0, inf\) or None, got 0.0"),
        ({"gain_step": -1.0}, r"`gain_step` must be a number in \(0, inf\), got -1.0"),
        ({"gain_alpha_acc": 0.0}, r"`gain_alpha_acc` must be a number in \(0, inf\)"),
        ({"gain_alpha_angle": 0.0}, r"`gain_alpha_angle` must be a number in \(0, inf\)"),
        ({"gain_beta": 1.5}, r"`gain_beta` must be a number in \[0, 1\], got 1.5"),
        ({"gain_shift_max": 0.0}, r"`gain_shift_max` must be a number in \(0, inf\), got 0.0"),
        ({"gain_shift_min": 2000.0}, "`gain_shift_min` must be at most `gain_shift_max`=1000.0, got 2000.0"),
        ({"gain_shift_min": math.nan}, "`gain_shift_min` must be .*, got nan"),
        ({"gain_subset_size": 0}, r"`gain_subset_size` must be a number in \[1, inf\) or None, got 0"),
        ({"gain_inter_weight": -1.0}, r"`gain_inter_weight` must be a number in \[0, inf\), got -1.0"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GainRlGRPOConfig(**settings("policy", tmp_path, **values))


def test_an_unknown_accuracy_reward_is_refused(policy_path, tmp_path):
    with pytest.raises(ValueError, match=r"`gain_accuracy_reward` must be one of \['checksum'\], got 'exact'"):
        make(GainRlGRPOTrainer, policy_path, tmp_path, gain_accuracy_reward="exact")


def test_a_streamed_dataset_is_refused(policy_path, tmp_path):
    with pytest.raises(ValueError, match=r"\['gain_rl'\].*map-style `train_dataset`.*without streaming"):
        make(GainRlGRPOTrainer, policy_path, tmp_path, data=dataset("policy").to_iterable_dataset())


@pytest.mark.parametrize(
    ("sigma", "flat"), [(1000.0, True), (0.9, False), (0.15, False), (30.0, True), (3.0, False), (None, False)]
)
def test_a_curriculum_that_hardly_is_one_is_told(sigma, flat, policy_path, tmp_path, caplog):
    """Of 16 prompts the first is at the start exp(15² / 2σ²) times as likely as the last."""
    make(GainRlGRPOTrainer, policy_path, tmp_path, gain_sigma=sigma)
    assert ("hardly a curriculum" in caplog.text) == flat
