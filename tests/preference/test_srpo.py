import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from papertrl import SrpoDPOConfig, SrpoDPOTrainer, revise
from papertrl.evaluation.revision import revision_prompt
from papertrl.losses.preference.srpo import improver_loss, joint_loss
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import (
    CHOSEN,
    PROMPTS,
    REJECTED,
    history,
    loss_and_gradients,
    make_trainer,
    pairs,
    perturbed,
    recorded,
    warmed,
    weights,
)

TEMPLATE = "{prompt}{answer}>"
SHORT = {"beta": 0.3, "srpo_revision_template": TEMPLATE}


def a_trainer(tiny_path, tokenizer, tmp_path, cls=SrpoDPOTrainer, **options):
    return make_trainer(cls, tiny_path, tokenizer, tmp_path, **{**SHORT, **options})


# --- The mathematics --------------------------------------------------------------------------------------------


def p(first, second, after, beta):
    """P(first ≻ second) as the improver implies it, where `second` is what it was asked to improve on."""
    return 0.5 + beta * (after[first, second] - after[second, second])


@given(
    numbers=st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=1, max_size=4),
    beta=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_losses_are_squared_errors_of_the_game_s_probabilities(numbers, beta):
    rows = [[torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in row] for row in numbers]
    joint, improver = [], []
    for margin, wl, ll, ww, lw in rows:
        after = {("w", "l"): wl, ("l", "l"): ll, ("w", "w"): ww, ("l", "w"): lw}
        # The label: w beats l for certain, and l loses to w
        improver.append(((1 - p("w", "l", after, beta)) ** 2 + (0 - p("l", "w", after, beta)) ** 2) / 2)
        # Both optima together, the diagonal terms eliminated
        joint.append((1 - (0.5 + beta / 2 * (wl - lw + margin))) ** 2)
    columns = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    margin, wl, ll, ww, lw = columns.unbind(1)
    found = joint_loss(margin, wl, lw, beta), improver_loss(wl, ll, ww, lw, beta)
    torch.testing.assert_close(found, (torch.stack(joint), torch.stack(improver)))
    (found[0] + 2 * found[1]).sum().backward()
    sum(j + 2 * i for j, i in zip(joint, improver, strict=True)).backward()
    expected = torch.tensor([[t.grad.item() for t in row] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(columns.grad, expected)


def test_the_game_s_solution_is_a_zero_of_both_losses():
    beta, inner = 0.2, torch.tensor([1.0, -3.0], dtype=torch.float64)
    # h†(w|l) − h†(l|l) = h†(w|w) − h†(l|w) = 1/(2β), and h(w) − h(l) = h†(w|w) − h†(l|l)
    ll, lw = inner, inner + 2.0
    wl, ww = ll + 0.5 / beta, lw + 0.5 / beta
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(improver_loss(wl, ll, ww, lw, beta), zero)
    torch.testing.assert_close(joint_loss(ww - ll, wl, lw, beta), zero)


# --- Rows -------------------------------------------------------------------------------------------------------


def test_six_sequences_per_pair(tiny_path, tokenizer, tmp_path):
    trainer = a_trainer(tiny_path, tokenizer, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 3)])
    texts = [
        [
            (tokenizer.decode(ids[(attention > scored)]), tokenizer.decode(ids[scored.bool()]))
            for ids, attention, scored in zip(*rows, strict=True)
        ]
        for rows in zip(
            *(batch["extras"][f"srpo_{n}"] for n in ("input_ids", "attention_mask", "completion_mask")), strict=True
        )
    ]
    eos = tokenizer.eos_token
    for (prompt, chosen, rejected), row in zip([("1+1=", "2", "33333"), ("7", "123", "4567")], texts, strict=True):
        after_rejected, after_chosen = f"{prompt}{rejected}>", f"{prompt}{chosen}>"
        assert row == [
            (after_rejected, chosen + eos),
            (after_rejected, rejected + eos),
            (after_chosen, chosen + eos),
            (after_chosen, rejected + eos),
        ]


def test_prompts_that_ask_for_more():
    assert revision_prompt("{x}", "a}", "{prompt}|{answer}|{{}}") == "{x}|a}|{}"
    user, answer = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
    asked = revision_prompt(user, answer, request="better")
    assert asked == [*user, *answer, {"role": "user", "content": "better"}]
    assert len(user) == 1


# --- A step -----------------------------------------------------------------------------------------------------


def sequence_logp(model, tokenizer, prompt, completion):
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids = prompt_ids + tokenizer.encode(completion, add_special_tokens=False) + [tokenizer.eos_token_id]
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prompt_ids), len(ids)))


def by_hand(trainer, rows, alpha, beta):
    """The loss a pair and a sequence at a time."""
    losses = []
    for prompt, chosen, rejected in rows:

        def log_ratio(answer, before=None, prompt=prompt):
            context = prompt if before is None else TEMPLATE.format(prompt=prompt, answer=before)
            with torch.no_grad():
                reference = sequence_logp(trainer.ref_model, trainer.tokenizer, context, answer)
            return sequence_logp(trainer.model, trainer.tokenizer, context, answer) - reference

        w, l = chosen, rejected  # noqa: E741
        h = {(a, b): log_ratio(a, b) for a in (w, l) for b in (w, l, None)}
        joint = (0.5 - beta / 2 * (h[w, l] - h[l, w] + h[w, None] - h[l, None])) ** 2
        improver = 0.5 * ((0.5 - beta * (h[w, l] - h[l, l])) ** 2 + (0.5 - beta * (h[w, w] - h[l, w])) ** 2)
        losses.append((1 - alpha) * joint + alpha * improver)
    return sum(losses) / len(losses)


ROWS = list(zip(PROMPTS, CHOSEN, REJECTED, strict=True))


def batch_of(trainer, indices):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in indices]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [False, True])
def test_loss_and_gradient_are_the_equation_by_hand(alpha, share, tiny_path, tokenizer, tmp_path):
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, srpo_alpha=alpha, share_prompts=share, check_records=True)
    loss, gradients = loss_and_gradients(trainer, batch_of(trainer, range(4)))
    expected = by_hand(trainer, ROWS[:4], alpha, 0.3)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    trainer.model.zero_grad()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    metrics = recorded(trainer)
    total = (1 - alpha) * metrics["loss/joint"] + alpha * metrics["loss/improver"]
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["srpo/dropped_pairs"] == 0


def test_prompts_of_two_answers_are_computed_once(tiny_path, tokenizer, tmp_path, monkeypatch):
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, share_prompts=True)
    seen = []
    score = trainer.score_tokens
    monkeypatch.setattr(
        trainer,
        "score_tokens",
        lambda model, inputs, mask: (
            seen.append(inputs["input_ids"][inputs["attention_mask"].bool()].numel()),
            score(model, inputs, mask),
        )[1],
    )
    forwards = []
    trainer.model.model.embed_tokens.register_forward_hook(lambda m, args, out: forwards.append(out.shape[:2].numel()))
    trainer.compute_loss(trainer.model, batch_of(trainer, range(4)))
    # Pairs, then the four further sequences, for policy and reference
    assert len(seen) == 4
    plain = a_trainer(tiny_path, tokenizer, tmp_path, share_prompts=False)
    alone = []
    plain.model.model.embed_tokens.register_forward_hook(lambda m, args, out: alone.append(out.shape[:2].numel()))
    plain.compute_loss(plain.model, batch_of(plain, range(4)))
    assert sum(forwards) < 0.75 * sum(alone)


def test_a_pair_cut_off_does_not_count(tiny_path, tokenizer, tmp_path):
    rows = [("1", "2", "3"), ("2", "4", "6"), ("1", "2", "34567")]
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    # "134567>" fills it up, and leaves no room after the rejected answer
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, dataset=Dataset.from_dict(columns), max_length=7)
    loss, gradients = loss_and_gradients(trainer, batch_of(trainer, range(3)))
    metrics = recorded(trainer)
    assert metrics["srpo/dropped_pairs"] == pytest.approx(1 / 3)
    kept = loss_and_gradients(trainer, batch_of(trainer, range(2)))[0]
    torch.testing.assert_close(loss, kept)
    recorded(trainer)
    loss, gradients = loss_and_gradients(trainer, batch_of(trainer, [2]))
    assert loss == 0 and all((g == 0).all() for g in gradients.values())
    assert recorded(trainer)["srpo/dropped_pairs"] == 1


class Doubtful(SrpoDPOTrainer):
    """Says that labels are wrong at a probability that the test sets."""

    doubt = 0.0

    def smoothing(self, record):
        return record.logps.new_full((len(record.logps) // 2,), self.doubt)


def test_smoothed_labels_are_those_of_the_exchanged_pair(tiny_path, tokenizer, tmp_path):
    flipped = pairs().rename_columns({"chosen": "rejected", "rejected": "chosen"})

    def loss_of(dataset, doubt):
        trainer = a_trainer(tiny_path, tokenizer, tmp_path, Doubtful, dataset=dataset)
        trainer.doubt = doubt
        return trainer.compute_loss(trainer.model, batch_of(trainer, range(4))).item()

    right, wrong = loss_of(pairs(), 0.0), loss_of(flipped, 0.0)
    assert abs(right - wrong) > 1e-3
    assert loss_of(pairs(), 1.0) == pytest.approx(wrong, rel=1e-5)
    assert loss_of(pairs(), 0.2) == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-5)


# --- Runs -------------------------------------------------------------------------------------------------------


def test_the_improver_learns_to_prefer_the_better_answer(tiny_path, tokenizer, tmp_path):
    trainer = a_trainer(
        tiny_path,
        tokenizer,
        tmp_path,
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        eval_dataset=pairs(1),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_srpo/improver_accuracies"] > 0.9 > before["eval_srpo/improver_accuracies"]
    for name in ("joint", "improver"):
        assert after[f"eval_loss/{name}"] < 0.3 * before[f"eval_loss/{name}"]


CHAT = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def chat_rows():
    def said(role, texts):
        return [[{"role": role, "content": text}] for text in texts]

    answers = {"chosen": said("assistant", CHOSEN), "rejected": said("assistant", REJECTED)}
    return Dataset.from_dict({"prompt": said("user", PROMPTS), **answers})


def test_trains_on_messages(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = CHAT
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, dataset=chat_rows(), srpo_revision_request="better")
    row = trainer.train_dataset[1]
    assert tokenizer.decode(row["srpo_after_rejected_ids"]) == "<u>22|<a>1|<u>better|<a>"
    trainer.train()
    assert history(trainer)[0]["loss/improver"] > 0


def test_without_alpha_it_is_dpo(tiny_path, tokenizer, tmp_path):
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, loss_type="hinge")
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, srpo_alpha=None, beta=0.1, loss_type="hinge")
    for t in (base, trainer):
        t.train()
    for name, value in weights(base).items():
        assert torch.equal(value, weights(trainer)[name])


def test_trains_on_pairs_of_the_online_loop(tiny_path, tokenizer, tmp_path):
    def digits(completions, **kwargs):
        return [float(sum(c.isdigit() for c in text)) for text in completions]

    args = SrpoDPOConfig(
        str(tmp_path),
        srpo_revision_template=TEMPLATE,
        online_iterations=2,
        online_max_new_tokens=6,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
    )
    trainer = SrpoDPOTrainer(
        perturbed(tiny_path), None, args, train_dataset=pairs(), processing_class=tokenizer, reward_funcs=digits
    )
    trainer.train()
    rows = [row for row in history(trainer) if "loss/improver" in row]
    assert len(rows) == 2 and all(row["srpo/dropped_pairs"] == 0 for row in rows)


# --- Revising ---------------------------------------------------------------------------------------------------


def test_revises_what_it_answered(tiny_path, tokenizer):
    # Counts up: the answer to a digit is the next one, and so is the revision of an answer
    texts = [f"{i}={i + 1}" for i in range(8)] + [f">{i}={j}={j + 1}" for i in range(4) for j in range(1, 8)]
    model = warmed(tiny_path, tokenizer, texts, steps=150).eval()
    histories = revise(model, tokenizer, ["1=", "3="], 3, ">{prompt}{answer}=", max_new_tokens=4, temperature=0.0)
    assert histories == [["2", "3", "4", "5"], ["4", "5", "6", "7"]]
    assert revise(model, tokenizer, ["1="], 0, ">{prompt}{answer}=", max_new_tokens=4, temperature=0.0) == [["2"]]
    drawn = [revise(model, tokenizer, ["5="], 2, ">{prompt}{answer}=", max_new_tokens=4, seed=seed) for seed in (0, 0)]
    assert drawn[0] == drawn[1] and len(drawn[0][0]) == 3
    with pytest.raises(ValueError, match="`num_revisions` must be at least 0, got -1"):
        revise(model, tokenizer, ["1="], -1)


def test_revises_messages(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = CHAT
    model = perturbed(tiny_path).eval()
    [answers] = revise(model, tokenizer, [[{"role": "user", "content": "1"}]], 1, max_new_tokens=4)
    assert [[message["role"] for message in answer] for answer in answers] == [["assistant"], ["assistant"]]


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"srpo_alpha": 1.5}, r"`srpo_alpha` must be a number in \[0.0, 1.0\] or None, got 1.5"),
        ({"beta": 0.0}, "`beta` must be"),
        ({"srpo_revision_template": "{prompt}"}, r"`srpo_revision_template` must hold `{answer}` .* got '{prompt}'"),
        ({"srpo_revision_template": "{answer}{x}"}, "`srpo_revision_template` must hold"),
        ({"srpo_revision_template": "{answer}{"}, "`srpo_revision_template` must hold"),
        ({"loss_type": "ipo"}, r"`srpo_alpha=0.5` replaces .* needs `loss_type=\['sigmoid'\]`, got \['ipo'\]"),
        ({"precompute_ref_log_probs": True}, "needs `precompute_ref_log_probs=False`, got True"),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SrpoDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)
