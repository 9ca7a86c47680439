"""Shared prompts and fast rollouts against plain passes and `generate`, over transformers' causal architectures."""

import copy

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from papertrl.samplers.decoding.rollout import sample_rollouts, supported
from papertrl.trainers.packed_forward import add_packed_forward
from papertrl.trainers.packing import pack
from papertrl.trainers.sharing import find_sharing

from .harness.architectures import ARCHITECTURES, ATTEMPTS, VOCAB, NotBuildableError, tiny_architecture, tiny_config

ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
# Architecture, options, whether prompts are shared, and with which longest row
VARIANTS = {
    "positions from the mask": ("opt", {}, True, None),
    "learned positions": ("gpt2", {}, True, None),
    "local attention": ("gpt_neo", {"window_size": 4}, False, None),
    "slopes from the mask": ("bloom", {}, False, None),
    "experts": ("qwen2_moe", {}, True, None),
    "long factors": (
        "phi3",
        {"original_max_position_embeddings": 24, "sliding_window": None, "rope_parameters": {**ROPE, **LONG}},
        True,
        24,
    ),
    "dynamic factors": (
        "llama",
        {"max_position_embeddings": 24, "rope_parameters": {**ROPE, "rope_type": "dynamic"}},
        True,
        23,
    ),
    "sliding window": ("mistral", {}, True, None),
    "attends to what follows": ("bert", {"is_decoder": False}, False, None),
    "recurrent": ("mamba", {}, False, None),
    "recurrent beside attention": ("qwen3_next", {"num_hidden_layers": 4}, False, None),
    "states and attention": (
        "granitemoehybrid",
        {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["linear_attention", "full_attention"]},
        False,
        None,
    ),
    "convolutions and attention": ("lfm2", {"layer_types": ["conv", "full_attention"]}, False, None),
    "states outside of the cache": ("recurrent_gemma", {"num_hidden_layers": 4}, False, None),
}
SAMPLED_BY_GENERATE = {"long factors", "dynamic factors", "recurrent", "states outside of the cache"}
# Prompts' lengths and the completions' longest: short, and beyond every window and switch above
BATCHES = {"short": ((3, 5, 1), 6), "of one length": ((6, 6), 5), "long": ((12, 22, 17), 20)}


def rows(prompts, time, group=2):
    """Left-padded prompts with right-padded completions, their mask, and the prompts' width."""
    generator = torch.Generator().manual_seed(len(prompts) + time)
    width = max(prompts)
    ids = torch.randint(3, VOCAB, (len(prompts) * group, width + time), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(len(ids)):
        prompt = prompts[i // group]
        ids[i, :width] = ids[i // group * group, :width]
        mask[i, : width - prompt] = 0
        mask[i, width + 1 + (3 * i + time - 1) % time :] = 0
    return ids.masked_fill(mask == 0, 0), mask, width


def right_padded(ids, mask, width):
    """The same rows as TRL lays out pairs, and the mask of completions."""
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    completion = mask.clone()
    completion[:, :width] = 0
    return tuple(value.gather(1, order) for value in (ids, mask, completion))


def trl_scores(model, ids, mask, completion):
    out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(completion == 0, -100), fused_lm_head=True)
    return out.log_probs


def gradients(model, scores, weight):
    model.zero_grad()
    (scores * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_sharing(model, left_padded: bool) -> dict | str:
    """Largest differences to TRL's log-probabilities and, relative to the largest, gradients, or why not shared."""
    sharing = find_sharing(model, left_padded)
    if isinstance(sharing, str):
        return sharing
    add_fused_lm_head(model)
    add_packed_forward(model)
    found = {"logps": 0.0, "gradients": 0.0, "lengths": []}
    for prompts, time in BATCHES.values():
        ids, mask, width = rows(prompts, time)
        completion = mask.clone()
        completion[:, :width] = 0
        if not left_padded:
            ids, mask, completion = right_padded(ids, mask, width)
        if sharing.limit is not None and ids.shape[1] > sharing.limit:
            continue
        found["lengths"].append(ids.shape[1])
        expected = trl_scores(model, ids, mask, completion)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)) * completion[:, 1:]
        wanted = gradients(model, expected, weight)
        prompts_of = (mask - completion).sum(1)
        got = model(packing=pack(ids, mask, prompts_of, completion.bool(), sharing.count_padding)).scores
        got = got["log_probs"][:, 1:]
        given = gradients(model, got, weight)
        scale = max(value.abs().max() for value in wanted.values())
        found["logps"] = max(found["logps"], ((got - expected) * completion[:, 1:]).abs().max().item())
        apart = max((given.get(n, torch.zeros(())) - value).abs().max() / scale for n, value in wanted.items())
        found["gradients"] = max(found["gradients"], apart.item())
    return found


def compare_rollouts(model) -> dict | str:
    """Largest difference of log-probabilities to `generate`, whose greedy tokens are the same, or why not fast."""
    found = {"logps": 0.0, "other tokens": 0}
    for prompts, time in BATCHES.values():
        ids, mask, width = rows(prompts, time, group=1)
        config = GenerationConfig(max_new_tokens=time, do_sample=False, pad_token_id=0, eos_token_id=list(range(3, 9)))
        if (reason := supported(model, config)) is not None:
            return reason
        ids, mask = ids[:, :width], mask[:, :width]
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, generation_config=config, return_dict_in_generate=True, output_scores=True
            )
        logps = torch.stack(out.scores, 1).log_softmax(-1)
        given = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
        ours = sample_rollouts(model, given, [1] * len(given), config)
        for i, (tokens, mine) in enumerate(zip(ours.completion_ids, ours.logprobs, strict=True)):
            theirs = out.sequences[i, width : width + len(tokens)].tolist()
            found["other tokens"] += theirs != tokens
            wanted = logps[i, : len(theirs)].gather(1, torch.tensor(theirs).unsqueeze(1)).squeeze(1)
            same = min(len(theirs), len(mine))
            found["logps"] = max(found["logps"], float(np.abs(np.array(mine[:same]) - wanted[:same].numpy()).max()))
    return found


def check(model) -> tuple[dict | str, dict | str, dict | str]:
    """What was found of the policy's layout, of the preference family's, and of rollouts; fails where they differ."""
    rollouts = compare_rollouts(copy.deepcopy(model))
    policy, preference = (compare_sharing(copy.deepcopy(model), left_padded) for left_padded in (True, False))
    for found in (policy, preference):
        assert isinstance(found, str) or (found["logps"] < 1e-3 and found["gradients"] < 1e-3), found
    assert isinstance(rollouts, str) or (rollouts["logps"] < 1e-3 and not rollouts["other tokens"]), rollouts
    return policy, preference, rollouts


@pytest.mark.parametrize("name", VARIANTS)
def test_shared_prompts_and_fast_rollouts_are_the_plain_ones(name):
    architecture, options, shared, limit = VARIANTS[name]
    *sharing, rollouts = check(tiny_architecture(tiny_config(architecture, **options)))
    assert isinstance(rollouts, str) == (name in SAMPLED_BY_GENERATE), rollouts
    for found in sharing:
        assert isinstance(found, dict) == shared, found
        # Above the limit the plain pass is made
        assert not shared or (max(found["lengths"]) == 42) == (limit is None), found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    reasons = []
    for options in ATTEMPTS:
        try:
            model = tiny_architecture(tiny_config(architecture, **options))
        except NotBuildableError as reason:
            reasons.append(f"{options}: {reason}")
            continue
        # Read with `-rP`
        print(architecture, *check(model), sep=" | ")
        return
    pytest.skip("; ".join(reasons))
