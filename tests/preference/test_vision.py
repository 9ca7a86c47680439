"""Datasets with images go through the same stages."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import DPOConfig, DPOTrainer

from papertrl import HypoDPOTrainer, LnDPOTrainer, PreferenceTrainer, RpoDPOTrainer, compose
from papertrl.models.tiny import tiny_tokenizer

from ..harness.pairs import assert_same_tensors, history, make_trainer, weights

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def model(processor, seed: int):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(processor.tokenizer), pad_token_id=0),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def pictures() -> Dataset:
    def messages(role, texts):
        return [[{"role": role, "content": text}] for text in texts]

    return Dataset.from_dict(
        {
            "image": [Image.new("RGB", (8, 8), (20 * i, 3, 5)) for i in range(8)],
            "prompt": messages("user", ["what"] * 8),
            "chosen": messages("assistant", [str(i) for i in range(8)]),
            "rejected": messages("assistant", [str(3 * i) for i in range(10, 18)]),
        }
    )


def trainer_of(cls, processor, tmp_path, **options):
    models = (model(processor, 0), model(processor, 1))
    return make_trainer(cls, None, processor, tmp_path, *models, dataset=pictures(), **options)


def test_equals_trl(processor, tmp_path):
    parent = trainer_of(DPOTrainer, processor, tmp_path, config_class=DPOConfig)
    base = trainer_of(PreferenceTrainer, processor, tmp_path)
    parent.train(), base.train()
    assert_same_tensors(weights(parent), weights(base))
    assert history(base)[0]["loss"] == history(parent)[0]["loss"]


def test_offline_methods_train_and_the_online_one_refuses(processor, tmp_path):
    trainer = trainer_of(compose(LnDPOTrainer, RpoDPOTrainer), processor, tmp_path)
    trainer.train()
    row = history(trainer)[0]
    assert row["length_norm/divisor"] > 0
    assert row["loss/rpo_nll"] > 0
    with pytest.raises(ValueError, match="does not support datasets with images"):
        trainer_of(HypoDPOTrainer, processor, tmp_path)
