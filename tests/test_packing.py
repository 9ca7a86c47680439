"""Packed rows: each shared prefix once, what a token sees, and the scores and gradients of the plain forward."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from papertrl.models.observation import causal_lm
from papertrl.trainers.packed_forward import add_packed_forward
from papertrl.trainers.packing import call_buckets, pack
from papertrl.trainers.sharing import find_sharing, why_not_shared

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "rotary": Qwen2Config(**SIZES, **HEADS),
    "learned positions": GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "windows": MistralConfig(**SIZES, **HEADS, head_dim=4, sliding_window=4),
    "windows in every other layer": Gemma3TextConfig(
        **SIZES, **HEADS, head_dim=4, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "eager": Qwen3Config(**SIZES, **HEADS, head_dim=4, attn_implementation="eager"),
    "eager, softcapped windows": Gemma2Config(
        **SIZES, **HEADS, head_dim=4, sliding_window=4, attn_implementation="eager"
    ),
}


def make_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def rows(prompts=(3, 5, 1), group=3, time=6, seed=0, common=0):
    """Rows in TRL's layout of rollouts, their mask and the prompts' width; values of padding are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    width, count = max(prompts) + 2, len(prompts) * group
    ids = torch.randint(0, 50, (count, width + time), generator=generator)
    mask = torch.zeros_like(ids)
    lengths = torch.randint(max(1, common), time + 1, (count,), generator=generator)
    for i in range(count):
        first, prompt = i // group * group, prompts[i // group]
        ids[i, width - prompt : width + common] = ids[first, width - prompt : width + common]
        mask[i, width - prompt : width + lengths[i]] = 1
    return ids, mask, width


def packed(ids, mask, width, labels=None, **options):
    labels = mask[:, width:].bool() if labels is None else labels
    return pack(ids, mask, mask[:, :width].sum(1), nn.functional.pad(labels, (width, 0)), **options)


def plain_scores(model, ids, mask, temperature=1.0):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float() / temperature
    logps = torch.log_softmax(logits, dim=-1)
    scores = {"log_probs": logps.gather(-1, ids[:, 1:, None]).squeeze(-1), "entropy": -(logps.exp() * logps).sum(-1)}
    return {name: nn.functional.pad(value, (1, 0)) for name, value in scores.items()}


# --- The sequence ----------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """Rows of two tokens only, so that much is shared by chance, padded anywhere, with any labels in completions."""
    time = draw(st.integers(2, 60))
    count = draw(st.integers(1, 6))
    ids, mask, labels = (torch.zeros(count, time, dtype=torch.long) for _ in range(3))
    prompts = torch.zeros(count, dtype=torch.long)
    pattern = torch.tensor(draw(st.lists(st.integers(1, 2), min_size=time, max_size=time)))
    for row in range(count):
        start = draw(st.integers(0, time - 1))
        end = draw(st.integers(start + 1, time))
        ids[row, start:end] = pattern[: end - start]
        ids[row, draw(st.integers(start, end - 1))] = draw(st.integers(1, 2))
        mask[row, start:end] = 1
        prompts[row] = prompt = draw(st.integers(1, end - start))
        size = end - start - prompt
        labels[row, start + prompt : end] = torch.tensor(
            draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype=torch.long
        )
    return ids, mask, prompts, labels.bool()


class Module:
    is_causal = True

    class config:
        _attn_implementation = "sdpa"


@given(layouts(), st.sampled_from([None, 1, 3, 17]), st.booleans(), st.booleans())
def test_every_token_sees_what_comes_before_it_in_its_own_row(layout, window, count_padding, whole):
    ids, mask, _, labels = layout
    packing = pack(*layout, count_padding=count_padding, whole=whole)
    count = packing.input_ids.numel()
    # Attention of equal weights over values that name their token
    query = torch.zeros(1, 2, count, 1)
    value = torch.eye(count)[None, None]
    out, _ = packing.attend(sdpa_attention_forward, Module(), query, query[:, :1], value, None, sliding_window=window)
    assert out.shape == (1, count, 2, count)
    seen = out[0, :, 0] > 0
    reached = torch.zeros(count, dtype=torch.bool)
    for row in range(len(ids)):
        columns = mask[row].nonzero().squeeze(1)
        scored = labels[row].nonzero().squeeze(1)
        last = columns[-1] + 1 if whole else (scored[-1] if len(scored) else 0)
        places = packing.places[row, columns[columns < last]]
        reached[places] = True
        for at, place in enumerate(places):
            expected = places[: at + 1] if window is None else places[max(0, at + 1 - window) : at + 1]
            assert set(seen[place].nonzero().squeeze(1).tolist()) == set(expected.tolist())
            assert packing.input_ids[0, place] == ids[row, columns[at]]
            assert packing.position_ids[0, place] == (columns[at] if count_padding else at)
    # Nothing is computed for nobody, but for a row that keeps the result connected to the model
    assert reached.all() or not (labels.any() or whole)
    assert (packing.label_ids == ids[labels]).all()
    predicting = [packing.places[row, column - 1] for row, column in labels.nonzero()]
    assert packing.scored.tolist() == predicting


def test_each_distinct_prompt_is_computed_once_and_no_padding():
    ids, mask, width = rows(prompts=(3, 5, 3), group=4)
    ids[8:, :width] = ids[:4, :width]
    packing = packed(ids, mask, width)
    # Of each completion all but the last token, which predicts nothing
    assert packing.input_ids.numel() == 3 + 5 + (mask[:, width:].sum(1) - 1).sum()
    assert packed(ids, mask, width, whole=True).input_ids.numel() == 3 + 5 + mask[:, width:].sum()
    none = packed(ids, mask, width, labels=torch.zeros_like(mask[:, width:]).bool())
    assert none.input_ids.numel() <= mask[0].sum() and none.label_ids.numel() == 0


def test_what_completions_have_in_common_is_computed_once_where_it_is_long():
    long, short = (rows(prompts=(5,), group=4, time=60, common=common, seed=common) for common in (40, 5))
    for (ids, mask, width), shared in ((long, 40), (short, 0)):
        single = 5 + (mask[:, width:].sum(1) - 1).sum()
        assert packed(ids, mask, width).input_ids.numel() == single - 3 * shared


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=40))
def test_calls_partition_stretches_and_save_pairs(sizes):
    sizes = [(queries, queries + before) for queries, before in sizes]
    parts = call_buckets(sizes)
    assert sorted(number for part in parts for number in part) == list(range(len(sizes)))
    cost = sum(len(part) * max(sizes[i][0] for i in part) * max(sizes[i][1] for i in part) for part in parts)
    assert cost <= len(sizes) * max((q for q, _ in sizes), default=0) * max((k for _, k in sizes), default=0)
    assert len(parts) <= 9


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "checkpointing", "lora", "lora, checkpointing", "bf16 autocast"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_scores_and_gradients_are_those_of_the_plain_forward(config, way):
    ids, mask, width = rows(time=9, common=2)
    labels = mask[:, width:].bool() & (torch.rand(mask[:, width:].shape, generator=torch.manual_seed(1)) < 0.6)
    weight = nn.functional.pad(torch.randn(labels.shape, generator=torch.manual_seed(2)) * labels, (width, 0))
    model = make_model(config)
    if "lora" in way:
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    shared = copy.deepcopy(model)
    assert find_sharing(shared, left_padded=True).count_padding
    add_packed_forward(causal_lm(shared), temperature=0.7)
    if "checkpointing" in way:
        for one in (model, shared):
            causal_lm(one).gradient_checkpointing_enable({"use_reentrant": False})
            causal_lm(one).enable_input_require_grads()
    context = torch.autocast("cpu", torch.bfloat16) if "bf16" in way else nullcontext()
    with context:
        expected, found = plain_scores(model, ids, mask, 0.7), shared(packing=packed(ids, mask, width, labels)).scores
    for scores in (expected, found):
        ((scores["log_probs"] + 0.1 * scores["entropy"]) * weight).sum().backward()
    tolerance = 3e-2 if "bf16" in way else 1e-5
    scored = nn.functional.pad(labels, (width, 0))
    for name, value in found.items():
        assert (value[~scored] == 0).all()
        torch.testing.assert_close(value[scored], expected[name][scored], rtol=tolerance, atol=tolerance)
    gradients = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (model, shared)]
    scale = max(value.abs().max() for value in gradients[0].values())
    assert gradients[0].keys() == gradients[1].keys() and scale > 1e-2
    for name, value in gradients[0].items():
        assert (value - gradients[1][name]).abs().max() <= tolerance * scale, name


def test_padding_cannot_leak():
    ids, mask, width = rows()
    model = make_model(MODELS["rotary"])
    add_packed_forward(model)
    noise = torch.where(mask.bool(), ids, (ids + 7) % 50)
    one, other = (model(packing=packed(x, mask, width)).scores["log_probs"] for x in (ids, noise))
    assert torch.equal(one, other)


def test_nothing_to_score_is_a_connected_zero():
    ids, mask, width = rows()
    model = make_model(MODELS["windows"])
    add_packed_forward(model)
    out = model(packing=packed(ids, mask, width, torch.zeros_like(mask[:, width:]).bool()))
    out.scores["log_probs"].sum().backward()
    assert out.scores["log_probs"].abs().sum() == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_plain_calls_and_generation_are_untouched(config):
    ids, mask, _ = rows()
    model = make_model(config).eval()
    before = model(input_ids=ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    add_packed_forward(model)
    assert (model(input_ids=ids, attention_mask=mask).logits == before).all()
    assert (model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False) == tokens).all()


@pytest.mark.slow
def test_a_compiled_model_scores_packed_rows():
    model = make_model(MODELS["windows in every other layer"])
    add_packed_forward(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", dynamic=True)
    for seed in (0, 1):
        ids, mask, width = rows(seed=seed)
        expected, found = (one(packing=packed(ids, mask, width)).scores["log_probs"] for one in (model, compiled))
        torch.testing.assert_close(found, expected)


def ragged_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    """What flash attention says it does with ragged rows: queries are the last of their keys."""
    assert attention_mask is None and query.shape[0] == 1
    query_ends, key_ends = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    assert max_length_q == cu_seq_lens_q.diff().max() and max_length_k == cu_seq_lens_k.diff().max()
    assert (query_ends[-1], key_ends[-1]) == (query.shape[2], key.shape[2])
    out = []
    for row in range(len(query_ends) - 1):
        q = query[:, :, query_ends[row] : query_ends[row + 1]]
        k, v = (states[:, :, key_ends[row] : key_ends[row + 1]].repeat_interleave(2, 1) for states in (key, value))
        distance = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])
        seen = (distance >= 0) & (distance < (sliding_window or 1000))
        weights = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append((weights @ v).transpose(1, 2))
    return torch.cat(out, 1), None


def test_flash_attention_gets_ragged_rows(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", ragged_attention)
    ids, mask, width = rows(time=60, common=35)
    plain = make_model(MODELS["windows in every other layer"])
    shared = copy.deepcopy(plain)
    shared.config._attn_implementation = "flash_attention_2"
    assert why_not_shared(shared) is None
    add_packed_forward(shared)
    scored = nn.functional.pad(mask[:, width:].bool(), (width, 0))
    expected, found = plain_scores(plain, ids, mask), shared(packing=packed(ids, mask, width)).scores
    torch.testing.assert_close(found["log_probs"][scored], expected["log_probs"][scored])
    for one, scores in ((plain, expected), (shared, found)):
        scores["log_probs"][scored].sum().backward()
        assert one.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    torch.testing.assert_close(
        shared.model.layers[0].self_attn.k_proj.weight.grad, plain.model.layers[0].self_attn.k_proj.weight.grad
    )


# --- Which models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4), "recurrent state"),
        (Qwen2Config(**SIZES, **HEADS, attn_implementation="flex_attention"), "flex_attention"),
    ],
    ids=["recurrent", "flex"],
)
def test_models_that_cannot_share_are_told_why(config, reason):
    assert reason in why_not_shared(make_model(config))


class OtherWindows(AutoModelForCausalLM.from_config(MODELS["windows"]).__class__):
    """Attends to other windows than its config says."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].self_attn.config = copy.copy(config)
        self.model.layers[0].self_attn.config.sliding_window = None


def test_a_model_whose_windows_are_not_those_of_its_config_does_not_share():
    assert "transformers' interface" in find_sharing(OtherWindows(MODELS["windows"]), left_padded=True)


def test_a_model_whose_tokens_see_what_follows_does_not_share():
    config = copy.deepcopy(MODELS["rotary"])
    config.is_causal = False
    model = make_model(config)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert "more than the prompt" in find_sharing(model, left_padded=True)
