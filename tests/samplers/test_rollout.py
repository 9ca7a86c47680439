import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from papertrl.samplers.decoding import forward
from papertrl.samplers.decoding.cache import GrowingLayer
from papertrl.samplers.decoding.forward import shares_prompts
from papertrl.samplers.decoding.rollout import _NEUTRAL, draw, sample_rollouts, supported
from papertrl.samplers.decoding.stopping import StopStrings
from papertrl.samplers.decoding.weights import packed_weights

VOCAB, PAD = 48, 0
EOS = list(range(1, 7))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Ragged, with a one-token prompt, and one that contains padding and end tokens
PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 0, 17, 2, 18, 19, 20], [21, 22], [23, 24, 25], [26], [27, 28]]


def make_model(kind: str, vocab: int = VOCAB):
    """Tiny model with random weights, its distribution uneven."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, num_key_value_heads=2, **SIZES))
    elif kind == "mistral":
        options = {"num_key_value_heads": 2, "sliding_window": 4}
        model = MistralForCausalLM(MistralConfig(vocab_size=vocab, **options, **SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_key_value_heads=2, **SIZES))
    model.eval()
    model.generation_config = GenerationConfig()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5)
        model.eval()
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "mistral", "lora"])
def any_model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def make_config(**options) -> GenerationConfig:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS} | options
    return GenerationConfig(**options)


def padded_rows(prompts, counts):
    rows = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return input_ids, mask


def generate(model, prompts, counts, config, **kwargs):
    """Completions by `model.generate`, up to and including the first end token."""
    input_ids, mask = padded_rows(prompts, counts)
    tokens = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, **kwargs)
    ends = np.atleast_1d([] if config.eos_token_id is None else config.eos_token_id)
    completions = []
    for row in tokens[:, input_ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        completions.append(row[:end])
    return completions


CONFIGS = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "encoder n-gram, which holds the prompts of all rows": {"encoder_no_repeat_ngram_size": 1},
    "minimum length": {"min_new_tokens": 5},
    "minimum length with the prompt": {"min_length": 12},
    "suppressed tokens": {"suppress_tokens": [PAD, 9, 30], "bad_words_ids": [[31], [12, 13]]},
    "forced tokens": {"forced_eos_token_id": 3, "forced_bos_token_id": 9, "begin_suppress_tokens": [8]},
    "growing end": {"exponential_decay_length_penalty": (3, 1.5), "remove_invalid_values": True},
    "biased tokens": {"sequence_bias": [[[20], 4.0], [[21, 22], -5.0]], "encoder_repetition_penalty": 1.4},
    "no time": {"max_time": 1e-9},
    "one new token": {"max_new_tokens": 1},
    "maximum length": {"max_new_tokens": None, "max_length": 11},
    "no end token": {"eos_token_id": None},
    "one end token": {"eos_token_id": 3},
    "one candidate": {"do_sample": True, "top_k": 1, "temperature": 0.7},
    "one nucleus": {"do_sample": True, "top_k": 0, "top_p": 1e-6, "min_p": 0.05},
    "one typical token": {"do_sample": True, "top_k": 0, "typical_p": 1e-6, "renormalize_logits": True},
    "cut-offs": {"do_sample": True, "top_k": 1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    "entropy": {"do_sample": True, "top_k": 1, "top_h": 0.4},
    "one candidate by min-p": {"do_sample": True, "top_k": 0, "min_p": 1.0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_deterministic_decoding_gives_the_tokens_of_generate(any_model, name):
    config = make_config(**CONFIGS[name])
    counts = [1, 2, 1, 1, 3, 1, 1, 1]
    assert supported(any_model, config) is None
    rollouts = sample_rollouts(any_model, PROMPTS, counts, config)
    assert rollouts.completion_ids == generate(any_model, PROMPTS, counts, config)
    assert [len(row) for row in rollouts.logprobs] == [len(row) for row in rollouts.completion_ids]
    assert rollouts.prefill_tokens == len(PROMPTS) * max(map(len, PROMPTS))


@pytest.mark.parametrize("length", [1, 4])
def test_prompts_of_equal_length_are_not_masked(any_model, length, monkeypatch):
    prompts = [[7 + i + j for j in range(length)] for i in range(6)]
    config = make_config()
    expected = generate(any_model, prompts, [2] * 6, config)
    assert sample_rollouts(any_model, prompts[:1], [1], config).completion_ids == expected[:1]
    masks = []
    inner = any_model.get_base_model() if isinstance(any_model, peft.PeftModel) else any_model
    hook = inner.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    assert sample_rollouts(any_model, prompts, [2] * 6, config).completion_ids == expected
    hook.remove()
    assert masks and all(mask is None for mask in masks)


def test_stop_strings_end_a_row(tokenizer):
    model = make_model("llama", vocab=len(tokenizer))
    prompts = [tokenizer(text)["input_ids"] for text in ("ab", "c", "12+3", "xyz", "0", "if")]
    # Only stop strings end a row, but without an end token `generate` would not pad the rows that are stopped
    config = make_config(max_new_tokens=16, eos_token_id=2, suppress_tokens=[0, 1, 2, 3])
    free = generate(model, prompts, [1] * 6, config)
    texts = [tokenizer.decode(row) for row in free]
    config.stop_strings = [texts[0][3:5], texts[1][6:7]]
    expected = generate(model, prompts, [1] * 6, config, tokenizer=tokenizer)
    expected = [[token for token in row if token != PAD] for row in expected]
    assert expected[0] == free[0][:5]
    assert len({len(row) for row in expected}) > 2
    rollouts = sample_rollouts(model, prompts, [1] * 6, config, tokenizer=tokenizer)
    assert rollouts.completion_ids == expected
    stops = StopStrings(config.stop_strings, tokenizer)
    assert stops.cut(prompts, free) == expected
    assert stops.ending(prompts, expected) == [len(row) < 16 for row in expected]


def test_a_stop_string_may_begin_in_the_prompt_and_spans_tokens(tokenizer):
    prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("1 ab", "cdxabcdy"))
    stops = StopStrings(["abcd", "xy"], tokenizer)
    assert stops.cut([prompt, [5]], [completion] * 2) == [completion[:2], completion[:7]]
    assert stops.ending([prompt, [5]], [completion[:2]] * 2) == [True, False]
    assert stops.ending([], []) == []


# Options that choose another mode of generation, for which the loop does not stand in; that say what `generate`
# returns, or how other modes, caches and compilation work; that are `None` in every config
ELSEWHERE = {
    *("num_beams", "use_mtp", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "constraints"),
    *("assistant_early_exit", "force_words_ids", "num_beam_groups", "diversity_penalty"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("early_stopping", "length_penalty", "low_memory", "is_assistant", "num_assistant_tokens", "speculation_type"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "cache_config", "max_cache_len"),
    *("compile_config", "disable_compile", "continuous_batching_config", "decoder_start_token_id"),
    *("_from_model_config", "transformers_version", "bos_token_id"),
}


def test_every_option_of_generation_is_followed_refused_or_without_effect():
    followed = {name for options in CONFIGS.values() for name in options}
    followed |= {"temperature", "pad_token_id", "stop_strings", "min_length"}
    assert set(GenerationConfig().to_dict()) - followed - _NEUTRAL.keys() - ELSEWHERE == set()


def next_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


@settings(max_examples=15)
@given(st.data())
def test_rows_are_what_a_loop_without_cache_or_company_gives(data):
    model = make_model("llama")
    prompt = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
    prompts = data.draw(st.lists(prompt, min_size=1, max_size=4))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(prompts), max_size=len(prompts)))
    eos = data.draw(st.sets(st.integers(1, VOCAB - 1), min_size=1, max_size=16))
    expected = []
    for prompt, count in zip(prompts, counts, strict=True):
        completion = []
        while count and len(completion) < 6 and not (completion and completion[-1] in eos):
            completion.append(int(next_logits(model, prompt + completion).argmax()))
        expected += [completion] * count
    config = make_config(max_new_tokens=6, eos_token_id=sorted(eos))
    rollouts = sample_rollouts(model, prompts, counts, config)
    assert rollouts.completion_ids == expected


def test_finished_rows_leave_the_batch(model):
    rollouts = sample_rollouts(model, PROMPTS, [2] * len(PROMPTS), make_config(max_new_tokens=20))
    lengths = [len(row) for row in rollouts.completion_ids]
    assert len(set(lengths)) > 2
    # The last token of a row is never forwarded
    assert rollouts.decode_row_steps == sum(length - 1 for length in lengths)


def test_company_does_not_change_a_row(any_model):
    config = make_config(repetition_penalty=1.3)
    together = sample_rollouts(any_model, PROMPTS, [1] * len(PROMPTS), config)
    for i, prompt in enumerate(PROMPTS):
        alone = sample_rollouts(any_model, [prompt], [1], config)
        assert alone.completion_ids[0] == together.completion_ids[i]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-5)


def processed(logits, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> np.ndarray:
    """Probabilities in the order in which transformers documents its filters; plain loops."""
    scores = [float(x) for x in logits.double()]
    for token in set(ids):
        scores[token] = scores[token] / repetition_penalty if scores[token] > 0 else scores[token] * repetition_penalty
    scores = np.array(scores) / temperature
    kept = np.ones(len(scores), dtype=bool)
    order = list(np.argsort(-scores))

    def probabilities():
        weights = np.where(kept, np.exp(scores - scores.max()), 0.0)
        return weights / weights.sum()

    if top_k:
        kept[order[top_k:]] = False
    before, mass = probabilities(), 0.0
    for token in order:
        # A token stays while those before it do not reach top_p
        kept[token] &= mass < top_p
        mass += before[token]
    before = probabilities()
    kept &= before >= min_p * before.max()
    return probabilities()


LAWS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.8, "top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.2},
    {"repetition_penalty": 1.6},
    {"temperature": 1.4, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
]


def chi_square_probability(counts: np.ndarray, expected: np.ndarray) -> float:
    """Tail probability of Pearson's statistic; cells of expectation below 5 are pooled."""
    assert (counts[expected == 0] == 0).all(), "something of probability 0 was drawn"
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("options", LAWS, ids=str)
def test_joint_law_of_two_tokens(options):
    small = make_model("llama", vocab=8)
    prompts, draws, end = [[3, 4, 5], [6]], 3000, 7
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    config = make_config(do_sample=True, max_new_tokens=2, eos_token_id=end, **full)
    torch.manual_seed(0)
    completions = sample_rollouts(small, prompts, [draws, draws], config).completion_ids
    for prompt, drawn in zip(prompts, (completions[:draws], completions[draws:]), strict=True):
        law = {}
        first = processed(next_logits(small, prompt), prompt, **options)
        for a in range(8):
            if a == end:
                law[(a,)] = first[a]
                continue
            second = processed(next_logits(small, [*prompt, a]), [*prompt, a], **options)
            law |= {(a, b): first[a] * second[b] for b in range(8)}
        counts = dict.fromkeys(law, 0)
        for completion in drawn:
            counts[tuple(completion)] += 1
        expected = draws * np.array(list(law.values()))
        assert chi_square_probability(np.array(list(counts.values())), expected) > 1e-3


@pytest.mark.parametrize("vocab", [5, 256, 700])
def test_draw_follows_the_probabilities(vocab):
    rng = np.random.default_rng(0)
    probabilities = torch.tensor(rng.dirichlet(np.full(vocab, 0.3)), dtype=torch.float32)
    probabilities[[0, vocab // 2, vocab - 1]] = 0.0
    torch.manual_seed(0)
    drawn = draw(probabilities.expand(20_000, -1)).squeeze(1)
    counts = torch.bincount(drawn, minlength=vocab).numpy()
    assert len(counts) == vocab
    expected = 20_000 * (probabilities / probabilities.sum()).double().numpy()
    assert chi_square_probability(counts, expected) > 1e-3


def test_draw_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="diverged"):
        draw(torch.tensor([[0.5, 0.5], [float("nan"), 0.5]]))


@pytest.mark.parametrize("options", LAWS, ids=str)
def test_logprobs_are_those_of_a_full_forward(any_model, options):
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    config = make_config(do_sample=True, max_new_tokens=6, **full)
    torch.manual_seed(0)
    rollouts = sample_rollouts(any_model, PROMPTS[:4], [2, 0, 1, 2], config)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[3]]
    for prompt, completion, logprobs in zip(prompts, rollouts.completion_ids, rollouts.logprobs, strict=True):
        for t, (token, logprob) in enumerate(zip(completion, logprobs, strict=True)):
            ids = prompt + completion[:t]
            expected = np.log(processed(next_logits(any_model, ids), ids, **options)[token])
            assert logprob == pytest.approx(expected, abs=1e-4)


def test_same_seed_same_rollouts(model):
    config = make_config(do_sample=True)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(sample_rollouts(model, PROMPTS, [2] * len(PROMPTS), config))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


class OnlyAfterSame(LogitsProcessor):
    """After an even token only even ones: depends on each row's own tokens, and is told the wrong ones loudly."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        parity = torch.arange(scores.shape[1]) % 2
        return scores.masked_fill(parity != input_ids[:, -1:] % 2, -torch.inf)


def test_processors_see_prompt_and_completion_of_every_row(any_model):
    config = make_config(repetition_penalty=1.3)
    processor = OnlyAfterSame()
    rollouts = sample_rollouts(
        any_model, PROMPTS, [1] * len(PROMPTS), config, processors=LogitsProcessorList([processor])
    )
    reference = LogitsProcessorList([OnlyAfterSame()])
    expected = generate(any_model, PROMPTS, [1] * len(PROMPTS), config, logits_processor=reference)
    assert rollouts.completion_ids == expected
    assert len(processor.seen[-1]) < len(processor.seen[0]), "rows must have left"
    width = max(map(len, PROMPTS))
    rows = [
        [PAD] * (width - len(prompt)) + prompt + completion
        for prompt, completion in zip(PROMPTS, rollouts.completion_ids, strict=True)
    ]
    for t, seen in enumerate(processor.seen):
        live = [row[: width + t] for row in rows if len(row) > width + t]
        assert all(row in seen.tolist() for row in live)


def test_adapter_is_used_and_stays():
    model = make_model("lora")
    adapted = sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), make_config())
    with model.disable_adapter():
        base = sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), make_config())
    assert base.completion_ids != adapted.completion_ids
    assert base.completion_ids == generate(make_model("llama"), PROMPTS, [1] * len(PROMPTS), make_config())
    assert sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), make_config()) == adapted


def test_dtype_and_mode_are_the_models():
    model = make_model("llama").to(torch.bfloat16).train()
    torch.manual_seed(0)
    rollouts = sample_rollouts(model, PROMPTS[:3], [2, 2, 2], make_config(do_sample=True))
    assert model.training
    for i, (completion, logprobs) in enumerate(zip(rollouts.completion_ids, rollouts.logprobs, strict=True)):
        logits = next_logits(model, PROMPTS[i // 2] + completion[:-1])
        assert logprobs[-1] == pytest.approx(float(logits.log_softmax(-1)[completion[-1]]), abs=0.15)


def test_runs_under_autocast(model):
    config = make_config()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts = sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), config)
    full = sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), config)
    first = [row[0] for row in rollouts.logprobs], [row[0] for row in full.logprobs]
    np.testing.assert_allclose(first[0], first[1], atol=0.15)
    assert first[0] != first[1]


OPERATION = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 5)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 100), min_size=1, max_size=6)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 100), min_size=1, max_size=6)),
    st.tuples(st.just("crop"), st.integers(0, 3)),
)


@given(st.lists(OPERATION, max_size=8), st.integers(1, 30))
def test_growing_layer_holds_what_a_dynamic_layer_does(operations, limit):
    torch.manual_seed(0)
    ours, reference = GrowingLayer(limit), DynamicLayer()
    assert ours.get_seq_length() == 0
    rows = 2
    for name, argument in [("update", 3), *operations]:
        if name == "update":
            keys, values = torch.randn(rows, 2, argument, 4), torch.randn(rows, 2, argument, 3)
            for mine, theirs in zip(ours.update(keys, values), reference.update(keys, values), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        elif name == "repeat":
            rows = min(rows, 4)
            for layer in (ours, reference):
                layer.batch_select_indices(torch.arange(rows))
                layer.batch_repeat_interleave(argument)
            rows *= argument
        elif name == "crop":
            argument = min(argument, ours.get_seq_length() - 1)
            for layer in (ours, reference):
                layer.crop(-argument)
        else:
            indices = torch.tensor(argument) % rows
            for layer in (ours, reference):
                (layer.batch_select_indices if name == "select" else layer.reorder_cache)(indices)
            rows = len(indices)
        assert ours.get_seq_length() == reference.get_seq_length()
        assert ours.get_mask_sizes(2) == reference.get_mask_sizes(2)
        torch.testing.assert_close(ours.keys, reference.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, reference.values, rtol=0, atol=0)


def test_growing_layer_writes_in_place():
    layer = GrowingLayer(limit=100)
    step = torch.ones(1, 1, 1, 2)
    buffers = set()
    for _ in range(64):
        layer.update(step, step)
        buffers.add(layer.keys.data_ptr())
    assert len(buffers) <= 7
    assert layer.get_seq_length() == 64
    layer.batch_select_indices(torch.tensor([0, 0]))
    assert layer.keys.untyped_storage().nbytes() == 100 * 2 * step.nbytes


@given(
    st.lists(st.one_of(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=4)), max_size=12),
    st.integers(2, 9),
)
def test_growing_layer_with_a_window_is_a_sliding_layer(operations, window):
    torch.manual_seed(0)
    ours, reference = GrowingLayer(200, window), DynamicSlidingWindowLayer(window)
    rows = 2
    for argument in [3, *operations]:
        if isinstance(argument, list):
            indices = torch.tensor(argument) % rows
            ours.batch_select_indices(indices)
            reference.batch_select_indices(indices)
            rows = len(indices)
            continue
        assert ours.get_mask_sizes(argument) == reference.get_mask_sizes(argument)
        keys, values = torch.randn(rows, 2, argument, 4), torch.randn(rows, 2, argument, 3)
        for mine, theirs in zip(ours.update(keys, values), reference.update(keys, values), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert ours.get_seq_length() == reference.get_seq_length()


def test_a_prompt_is_held_once_for_all_of_its_rows(monkeypatch):
    model = make_model("llama")
    prompts, time, count = [list(range(7, 47)), list(range(8, 46))], 8, 16
    held = []

    class Counting(forward.RowForward):
        def decode(self, tokens):
            logits = super().decode(tokens)
            states = [(layer.keys, layer.values, *layer.prompt) for layer in self.cache.layers]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for layer in states for t in layer}
            held.append(sum(storage.nbytes() for storage in storages.values()) // 4)
            return logits

    shares_prompts(model)
    monkeypatch.setattr("papertrl.samplers.decoding.rollout.RowForward", Counting)
    config = make_config(max_new_tokens=time, eos_token_id=None)
    sample_rollouts(model, prompts, [count, count], config)
    # Keys and values of 2 layers with 2 heads of 8; buffers of completions have room for at most 16 or all of them
    size = 2 * 2 * 2 * 8
    assert len(held) == time - 1
    assert max(held) <= size * (2 * 40 + 2 * count * 16)
    assert max(held) < size * 2 * count * 40 / 2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prompts_are_shared_with_plain_attention(kind, implementation):
    model = make_model(kind)
    model.set_attn_implementation(implementation)
    assert shares_prompts(model)
    counts = [3, 1, 2, 1, 1, 1, 1, 4]
    rollouts = sample_rollouts(model, PROMPTS, counts, make_config())
    assert rollouts.completion_ids == generate(model, PROMPTS, counts, make_config())


def test_prompts_are_not_shared_where_attention_is_of_another_kind():
    """Capped scores, of which a few tokens of small scores would not show that they are."""
    options = {"num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 1e4, "sliding_window": 4}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, **options, **SIZES)).eval()
    model.set_attn_implementation("eager")
    assert not shares_prompts(model)
    counts = [2] * len(PROMPTS)
    rollouts = sample_rollouts(model, PROMPTS, counts, make_config())
    assert rollouts.completion_ids == generate(model, PROMPTS, counts, make_config())


def test_packed_weights_multiply_alike(monkeypatch):
    monkeypatch.setattr("papertrl.samplers.decoding.weights._SMALLEST", 1)
    model, ids, seen = make_model("lora"), torch.tensor([PROMPTS[0]]), []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with packed_weights(model):
            assert "forward" in vars(layer)
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert len(seen) == 2 and not any("forward" in vars(module) for module in model.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_weights(model):
        assert "forward" not in vars(layer)


def test_reasons_why_a_model_is_not_supported():
    config = make_config()
    old = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    assert "past_key_values" in supported(old, config)
    both = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1))
    assert "encoder-decoder" in supported(both, config)
    assert "not a transformers model" in supported(torch.nn.Linear(1, 1), config)
    prefix = peft.get_peft_model(make_model("llama"), peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    assert "prompt-learning" in supported(prefix, config)
    activated = peft.LoraConfig("CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    assert "activated LoRA" in supported(peft.get_peft_model(make_model("llama"), activated), config)


def test_a_replaced_generate_is_found_out(monkeypatch):
    class Own(LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    config = make_config()
    reason = "has its own `generate`"
    assert reason in supported(Own(make_model("llama").config), config)
    for outer in (False, True):
        model = make_model("lora")
        holder = model if outer else model.get_base_model()
        assert supported(model, config) is None
        holder.generate = lambda *args, **kwargs: None
        assert reason in supported(model, config)

    class OwnPeft(peft.PeftModelForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    assert reason in supported(OwnPeft(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"])), config)
    lora = make_model("lora")
    for owner in (type(lora), type(lora.base_model)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "generate", lambda self, **kwargs: None, raising=False)
            assert reason in supported(lora, config)
    assert supported(lora, config) is None
    model = make_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", lambda self, **kwargs: None)
        assert reason in supported(model, config)
    assert supported(model, config) is None


def test_gradient_checkpointing_is_not_supported_in_training_mode():
    model = make_model("llama")
    model.gradient_checkpointing_enable()
    assert supported(model.eval(), make_config()) is None
    assert "gradient checkpointing" in supported(model.train(), make_config())
    model.gradient_checkpointing_disable()
    assert supported(model, make_config()) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"do_sample": True, "num_beams": 2}, "beam sample"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search"),
        ({"cache_implementation": "static"}, "`cache_implementation` is 'static'"),
        ({"use_cache": False}, "`use_cache` is False"),
        ({"guidance_scale": 1.5}, "`guidance_scale` is 1.5"),
        ({"pad_token_id": None, "eos_token_id": None}, "`pad_token_id`"),
    ],
)
def test_reasons_why_a_config_is_not_supported(model, options, reason):
    assert reason in supported(model, make_config(**options))


def test_options_left_open_are_the_models(model):
    open_config = GenerationConfig(max_new_tokens=8, do_sample=False)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    try:
        rollouts = sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), open_config)
    finally:
        model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    closed = sample_rollouts(model, PROMPTS, [1] * len(PROMPTS), make_config(max_new_tokens=8))
    assert rollouts == closed


def test_counts_and_prompts_are_checked(model):
    config = make_config()
    with pytest.raises(ValueError, match=r"`counts` must be one number >= 0 per prompt \(2 of them\), got \[1\]"):
        sample_rollouts(model, [[7], [8]], [1], config)
    with pytest.raises(ValueError, match=r"`counts`.*-1"):
        sample_rollouts(model, [[7]], [-1], config)
    with pytest.raises(ValueError, match="`prompt_ids`"):
        sample_rollouts(model, [[7], []], [1, 1], config)
    assert sample_rollouts(model, [[7]], [0], config).completion_ids == []
    assert sample_rollouts(model, [], [], config).logprobs == []
