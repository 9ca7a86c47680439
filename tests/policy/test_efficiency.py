"""Less work, the same gradient: shared prompts, rows without effect, micro-batches of whole groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from papertrl.core.catalogue import load_trainer
from papertrl.trainers.policy.base import PolicyConfig, PolicyTrainer
from papertrl.trainers.policy.batching import MicroBatches
from papertrl.trainers.policy.passes import score_tokens

from ..harness.architectures import tiny_architecture, tiny_config
from ..harness.table import active_config, build, dataset, digit_parity, settings, weights


def random_batch(prompts=(3, 5, 1), group=3, time=6, seed=0):
    """Rows in TRL's layout, their prompts' lengths and ragged completions; values of padding are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompts) + 2
    rows = len(prompts) * group
    ids = torch.randint(0, 50, (rows, width + time), generator=generator)
    mask = torch.zeros_like(ids)
    lengths = torch.randint(1, time + 1, (rows,), generator=generator)
    for i in range(rows):
        prompt = prompts[i // group]
        ids[i, width - prompt : width] = ids[i // group * group, width - prompt : width]
        mask[i, width - prompt : width + lengths[i]] = 1
    return ids, mask, width


@pytest.mark.parametrize(
    ("architecture", "options", "limit"),
    [
        ("opt", {}, None),
        (
            "phi3",
            {
                "sliding_window": None,
                "original_max_position_embeddings": 13,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 13,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                },
            },
            13,
        ),
    ],
    ids=["positions-from-the-mask", "long-factors"],
)
def test_a_trainer_scores_as_trl_wherever_positions_come_from(
    architecture, options, limit, tokenizer, tmp_path, caplog
):
    model = tiny_architecture(tiny_config(architecture, **options))
    trainer = PolicyTrainer(
        model,
        digit_parity,
        PolicyConfig(**settings("policy", tmp_path)),
        train_dataset=dataset("policy"),
        processing_class=tokenizer,
    )
    assert trainer.sharing.limit == limit
    trainer.model.eval()
    for time in (5, 6, 7):
        ids, mask, width = random_batch(time=time)
        assert width == 7
        with torch.no_grad():
            found, expected = (
                of._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, time)[0]
                for of in (PolicyTrainer, GRPOTrainer)
            )
        apart = ((found - expected) * mask[:, width:]).abs().max()
        assert apart < 1e-4
        # Above the limit it is TRL's own pass
        assert trainer.shares(ids.shape[1]) == (time < 7 or limit is None) and (
            trainer.shares(ids.shape[1]) or apart == 0
        )
    assert caplog.text.count("rows longer than 13 tokens") == (limit is not None)


def gradient(trainer, batches):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loss = sum(trainer.compute_loss(trainer.model, dict(batch)) for batch in batches)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        *[{"loss_type": loss} for loss in ("grpo", "dr_grpo", "luspo", "cispo", "sapo")],
        {"beta": 0.1},
        {"checkpointing": True},
        {"lora": True},
        {"lora": True, "checkpointing": True, "beta": 0.1},
        {"bf16": True},
        {"architecture": "mistral", "checkpointing": True},
        {"architecture": "gemma3_text", "checkpointing": True},
        {"max_tokens": 1},
        {"max_tokens": 25, "beta": 0.1},
        *[{"max_tokens": 12, "loss_type": loss} for loss in ("dapo", "grpo", "dr_grpo", "vespo")],
        {"max_tokens": 30, "share_prompts": False},
    ],
    ids=lambda o: "+".join(f"{k}={v}" for k, v in o.items()) or "default",
)
def test_a_whole_step_has_the_gradient_of_trl(options, policy_path, tokenizer, tmp_path):
    """The same rollouts through TRL's trainer and ours; one group has no variance."""

    def reward(prompts, completions, **kwargs):
        return [1.0 if p[0] in "2468" else s for p, s in zip(prompts, digit_parity(completions), strict=True)]

    ours_alone = {
        "max_tokens_per_micro_batch": options.get("max_tokens"),
        "share_prompts": "share_prompts" not in options,
    }
    architecture = options.get("architecture")
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if "lora" in options else None
    checkpointing = "checkpointing" in options
    options = {name: value for name, value in options.items() if name in ("loss_type", "beta", "bf16")}
    values = settings("policy", tmp_path, per_device_train_batch_size=8, num_generations=4, **options)

    def make(trainer_class, config):
        model = policy_path if architecture is None else tiny_architecture(tiny_config(architecture, sliding_window=3))
        torch.manual_seed(1)
        trainer = trainer_class(
            model, reward, config, dataset("policy"), processing_class=tokenizer, peft_config=peft_config
        )
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        trainer.model.train()
        return trainer

    theirs = make(GRPOTrainer, GRPOConfig(**values))
    rows = [row for i in (1, 2, 5, 8) for row in [theirs.train_dataset[i]] * 4]
    torch.manual_seed(5)
    batch = theirs._generate_and_score_completions(rows)
    live = int((batch["advantages"] != 0).sum())
    assert 0 < live < 16
    halves = [{k: v[s] if v.dim() else v for k, v in batch.items()} for s in (slice(0, 8), slice(8, 16))]
    expected_loss, expected = gradient(theirs, halves)

    args = PolicyConfig(**values, **ours_alone)
    ours = make(PolicyTrainer, args)
    assert bool(ours.sharing) == args.share_prompts and ours.batching is not None
    torch.manual_seed(5)
    ours._generate_single_turn = lambda *a, _rows=batch, **k: (
        [
            ids[: int(n)].tolist()
            for ids, n in zip(_rows["completion_ids"], _rows["completion_mask"].sum(1), strict=True)
        ],
        None,
    )
    ours._prepare_inputs(rows)
    computed = [len(b["advantages"]) for b in ours._buffered_inputs]
    if args.max_tokens_per_micro_batch is None:
        # The live rows fit into one micro-batch; a row without effect stands in for the other
        assert computed == ([8, 8] if options.get("beta") else [live, 1]) and live <= 8
    else:
        assert sum(computed) == (16 if options.get("beta") else live)
        assert sum(len(batch["pass_ids"].unique()) for batch in ours._buffered_inputs) > 2
    loss, found = gradient(ours, ours._buffered_inputs)
    tolerance = 5e-2 if args.bf16 else 1e-5
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    scale = max(g.abs().max() for g in expected.values())
    assert scale > 1e-2
    for name, value in found.items():
        assert (value - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_methods_read_of_a_pass_is_what_the_plain_pass_has(checkpointing, policy_path, tmp_path):
    args = PolicyConfig(**settings("policy", tmp_path, gradient_checkpointing=checkpointing))
    trainer = build(PolicyTrainer, "policy", policy_path, args)
    trainer.model.train()
    ids, mask, width = random_batch()
    needs = frozenset({"logps", "entropy", "hidden_states", "mlp_inputs"})
    tokens = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    passes = []
    for shares in (False, True):
        trainer.shares = lambda length, shares=shares: shares
        with torch.no_grad():
            passes.append(score_tokens(trainer, trainer.model, ids, mask, mask[:, width:].bool(), 4, needs)[0])
    plain, packed = passes
    # In three chunks of rows, of three prompts
    assert sum(tokens[:3]) == ids.numel() and sum(tokens[3:]) < mask.sum()
    completion = mask[:, width:].bool()
    for name in ("logps", "entropies", "hidden_states"):
        torch.testing.assert_close(getattr(packed, name)[completion], getattr(plain, name)[completion])
    torch.testing.assert_close(packed.mlp_inputs[mask.bool()], plain.mlp_inputs[mask.bool()])


def test_a_batch_without_effect_still_runs_every_micro_batch(policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    args = PolicyConfig(**settings("policy", tmp_path))
    trainer = PolicyTrainer(policy_path, constant, args, train_dataset=dataset("policy"))
    before = weights(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Of eight rows, one stands in for each of the two micro-batches
    assert all(entry["rows/skipped_fraction"] == 0.75 and entry["loss"] == 0 for entry in logs)
    assert all((before[key] == value).all() for key, value in weights(trainer).items())


def test_micro_batches_hold_whole_groups_and_every_row_once(policy_path, tmp_path):
    values = settings("policy", tmp_path, per_device_train_batch_size=8, num_generations=4, skip_zero_rows=False)
    args = PolicyConfig(**values, steps_per_generation=4)
    trainer = PolicyTrainer(policy_path, digit_parity, args, train_dataset=dataset("policy"))
    trainer.model.train()
    trainer._prepare_inputs([row for i in range(8) for row in [trainer.train_dataset[i]] * 4])
    groups = [batch["group_ids"].tolist() for batch in trainer._buffered_inputs]
    assert [len(g) for g in groups] == [8] * 4 and all(len(set(g)) == 2 for g in groups)
    assert sorted(group for batch in groups for group in batch) == sorted(list(range(8)) * 4)


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.data(),
)
def test_every_cut_covers_the_rows_with_effect_in_micro_batches_of_allowed_size(count, groups, limit, data):
    total = limit * count
    ids = torch.arange(total) * groups // total
    computed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    rows = torch.arange(total)[computed]
    cut = MicroBatches(count, windows=1, rows=limit).cut_window(rows, ids[rows], count)
    assert [row for batch in cut for row in batch.tolist()] == rows.tolist()
    assert len(cut) <= count and all(0 < len(batch) <= limit for batch in cut)
    # Rows without effect suffice to stand in for the micro-batches that are missing
    assert count - len(cut) <= total - len(rows)


@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.data()
)
def test_no_update_is_left_without_rows_while_another_has_several(windows, count, limit, size, data):
    steps = windows * count
    total = steps * limit
    ids = torch.arange(total) // size
    computed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    batches = MicroBatches(steps, windows, limit).cut(ids, computed)
    assert len(batches) == steps and all(0 < len(batch) <= limit for batch in batches)
    rows = [row for batch in batches for row in batch.tolist()]
    assert len(rows) == len(set(rows)) and set(torch.arange(total)[computed].tolist()) <= set(rows)
    updates = [torch.cat(batches[count * w : count * (w + 1)]) for w in range(windows)]
    live = [int(computed[update].sum()) for update in updates]
    assert min(live) > 0 or int(computed.sum()) < windows


def test_live_groups_are_not_divided(policy_path, tmp_path):
    def reward(prompts, completions, **kwargs):
        return [i % 2.0 if p[0] in "12" else 1.0 for i, p in enumerate(prompts)]

    values = settings("policy", tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    trainer = PolicyTrainer(policy_path, reward, PolicyConfig(**values), train_dataset=dataset("policy"))
    trainer.model.train()
    trainer._prepare_inputs([row for i in (1, 2, 5, 8) for row in [trainer.train_dataset[i]] * 4])
    sizes = [len(batch["group_ids"].unique()) for batch in trainer._buffered_inputs]
    assert sizes == [1] * 4 and [len(b["group_ids"]) for b in trainer._buffered_inputs] == [4, 4, 1, 1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": "bnpo"}, "averages over the micro-batch"),
        ({"top_entropy_quantile": 0.5}, "compares the tokens of a micro-batch"),
        ({"entropy_coef": 0.1}, "entropy bonus"),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, "end at different places"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_what_cannot_be_regrouped_or_shared_is_logged_and_trains_as_in_trl(
    options, reason, policy_path, tmp_path, caplog
):
    args = PolicyConfig(**settings("policy", tmp_path, **options))
    trainer = build(PolicyTrainer, "policy", policy_path, args)
    assert reason in caplog.text
    trainer.train()


@pytest.mark.parametrize("values", [{"bf16": True}, {"peft": True}, {"num_iterations": 2, "beta": 0.05}])
def test_trains_with_sharing_under(values, policy_path, tmp_path):
    values = dict(values)
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if values.pop("peft", False) else {}
    trainer_class = load_trainer("lp_reg")
    args = active_config(trainer_class, ["lp_reg"], tmp_path, **values)
    trainer = build(trainer_class, "policy", policy_path, args, **peft)
    assert trainer.sharing
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
