import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from papertrl import OfsDPOTrainer
from papertrl.adapters import combine_domains, fit_weights, weighted
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import first_batch, make_trainer, pairs

LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def random_adapter(tiny_path, folder, rank, alpha, seed):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, **LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapters(tiny_path, tmp_path):
    return [
        random_adapter(tiny_path, tmp_path / name, rank, alpha, seed)
        for name, rank, alpha, seed in (("a", 2, 8, 1), ("b", 4, 6, 2))
    ]


def loaded(tiny_path, adapters):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], "b")
    return model.eval()


def deltas(model, name):
    """s B A of every layer."""
    return {
        key: layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def test_written_adapter_is_the_sum_of_weighted_products(tiny_path, tokenizer, adapters, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    before = base(input_ids=IDS).logits
    found = combine_domains(base, adapters, [], tokenizer, tmp_path / "out", weights=[0.7, -1.5])
    assert torch.equal(base(input_ids=IDS).logits, before) and all(p.requires_grad for p in base.parameters())
    parts = loaded(tiny_path, adapters)
    combined = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), tmp_path / "out").eval()
    first, second, total = deltas(parts, "a"), deltas(parts, "b"), deltas(combined, "default")
    assert first.keys() == total.keys() and len(total) > 10
    for key, delta in total.items():
        torch.testing.assert_close(delta, 0.7 * first[key] - 1.5 * second[key], rtol=1e-5, atol=1e-6)
    with weighted(parts, ["a", "b"], torch.tensor([0.7, -1.5])):
        mixed = parts(input_ids=IDS).logits
    torch.testing.assert_close(combined(input_ids=IDS).logits, mixed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, before, atol=1e-2)
    record = json.loads((tmp_path / "out" / "combination.json").read_text())
    assert record["weights"] == found.weights == [0.7, -1.5] and record["adapters"] == adapters


def test_gradient_is_that_of_finite_differences_and_the_model_is_left_alone(tiny_path, adapters):
    model = loaded(tiny_path, adapters).double()
    alone = model(input_ids=IDS).logits

    def value(numbers):
        with weighted(model, ["a", "b"], numbers):
            return model(input_ids=IDS).logits.log_softmax(-1)[0, :-1].gather(-1, IDS[0, 1:, None]).sum()

    weights = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(value(weights), weights)
    for k in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[k] = 3e-3
        with torch.no_grad():
            numeric = (value(weights + shift) - value(weights - shift)) / 6e-3
        assert found[k].item() == pytest.approx(numeric.item(), rel=2e-2)
    assert torch.equal(model(input_ids=IDS).logits, alone)


def test_loss_is_that_of_the_trainer(tiny_path, tokenizer, adapters, tmp_path):
    memory = pairs(1)
    model = loaded(tiny_path, adapters)
    sizes = [fit_weights(model, ["a"], memory, tokenizer, beta=0.3, steps=0, batch_size=size) for size in (3, 8)]
    assert sizes[0].losses == pytest.approx(sizes[1].losses, rel=1e-5)
    # As if it were trained: the reference is the base model
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    config = LoraConfig(r=2, lora_alpha=8, **LORA)
    trainer = make_trainer(
        PreferenceTrainer, tiny_path, tokenizer, tmp_path, model=base, dataset=memory, peft_config=config, beta=0.3,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.model.load_adapter(adapters[0], "default")
    loss = trainer.compute_loss(trainer.model, first_batch(trainer)).item()
    assert sizes[0].losses == [pytest.approx(loss, rel=1e-4)]
    assert abs(loss - 0.6931) > 1e-3


def test_two_domains_end_to_end(tiny_path, tokenizer, tmp_path):
    """Each domain's adapter knows its own pairs; the combination is better on both than either."""
    domains = [
        Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 8, "chosen": ["2", "4"] * 8, "rejected": ["33", "55"] * 8}),
        Dataset.from_dict({"prompt": ["ab:", "cd:"] * 8, "chosen": ["abab", "cdcd"] * 8, "rejected": ["b", "d"] * 8}),
    ]
    folders = []
    for number, domain in enumerate(domains):
        trainer = make_trainer(
            OfsDPOTrainer, tiny_path, tokenizer, tmp_path / f"run_{number}", model=tiny_path, dataset=domain,
            peft_config=LoraConfig(r=4, lora_alpha=8, **LORA), max_steps=12, learning_rate=5e-3, beta=0.5,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        folders.append(trainer.args.output_dir)
    options = {"memory_size": 4, "beta": 0.5, "steps": 12, "learning_rate": 0.2}
    both = combine_domains(tiny_path, folders, domains, tokenizer, tmp_path / "both", **options)
    assert len(both.losses) == 13 and min(both.losses) < both.losses[0] - 0.02
    alone = [
        fit_weights(
            PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(tiny_path), folder, adapter_name="a"
            ).eval(),
            ["a"],
            Dataset.from_dict({key: domains[0][key][:4] + domains[1][key][:4] for key in domains[0].column_names}),
            tokenizer,
            beta=0.5,
            steps=0,
        ).losses[0]
        for folder in folders
    ]
    assert min(both.losses) < min(alone) - 0.02
    again = combine_domains(tiny_path, folders, domains, tokenizer, tmp_path / "again", **options)
    assert again == both


def test_refuses_what_does_not_add_up(tiny_path, tokenizer, adapters, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="`memories` must have one entry per adapter, 2, got 1"):
        combine_domains(tiny_path, adapters, [pairs()], tokenizer, out)
    with pytest.raises(ValueError, match="`weights` must have one entry per adapter, 2, got 3"):
        combine_domains(tiny_path, adapters, [], tokenizer, out, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="`memory_size` must be at least 1, got 0"):
        combine_domains(tiny_path, adapters, [pairs()] * 2, tokenizer, out, memory_size=0)
    with pytest.raises(ValueError, match="`adapters` must name at least one folder"):
        combine_domains(tiny_path, [], [], tokenizer, out)
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    get_peft_model(base, LoraConfig(r=2, use_rslora=True, **LORA)).save_pretrained(tmp_path / "rs")
    with pytest.raises(ValueError, match="has `use_rslora=True`, which does not combine linearly"):
        combine_domains(tiny_path, [adapters[0], tmp_path / "rs"], [pairs()] * 2, tokenizer, out)
