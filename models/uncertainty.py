"""A classifier of preference pairs whose dropout stays on: its passes differ where it is not sure of a label."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .observation import decoder_layers


class TokenizedPair(NamedTuple):
    """Token ids of a prompt and of two completions, each with what ends it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def copied_backbone(policy: PreTrainedModel | PeftModel, trust_remote_code: bool = False) -> PreTrainedModel:
    """A copy of a causal LM in float32, without head and adapter, to make a classifier of."""
    policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    backbone = AutoModel.from_config(policy.config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    # Adapters wrap the layers that they act on
    weights = policy.base_model.state_dict()
    backbone.load_state_dict({k.replace(".base_layer", ""): v for k, v in weights.items() if "lora_" not in k})
    return backbone


def loaded_backbone(
    name: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Callable[..., TokenizedPair]]:
    """
    Another model to make a classifier of, and how pairs are read with its vocabulary.

    Args:
        name (`str`):
            Its id or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            That of the pairs.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of the model's repository may run.

    Returns:
        The model in float32, and a function from the fields of a [`TokenizedPair`] to one with the model's tokens.
    """
    its = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    end = its.eos_token_id if its.eos_token_id is not None else its.sep_token_id

    def read(*pair: list[int]) -> TokenizedPair:
        texts = tokenizer.batch_decode(list(pair), skip_special_tokens=True)
        prompt, chosen, rejected = its(texts, add_special_tokens=False)["input_ids"]
        return TokenizedPair(prompt, [*chosen, end], [*rejected, end])

    return AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=trust_remote_code), read


class PairClassifier(nn.Module):
    """
    Says which of two completions of a prompt is the better one: two logits, of the first and of the second.

    It reads prompt, first and second completion in one row, and its head the state of the last token. Dropout acts on
    what attention and MLP of each layer add, on the token embeddings and on that state; in training mode only.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            Gives hidden states for embeddings; all its weights are trained.
        dropout (`float`):
            Rate in (0, 1).

    Raises:
        `ValueError`: if the backbone is not a stack of layers.
    """

    def __init__(self, backbone: PreTrainedModel, dropout: float):
        super().__init__()
        self.backbone = backbone.requires_grad_(True)
        self.backbone.config.use_cache = False
        self.dropout = nn.Dropout(dropout)
        width = backbone.get_input_embeddings().embedding_dim
        self.head = nn.Linear(width, 2, device=backbone.device, dtype=backbone.dtype)
        for layer in decoder_layers(backbone):
            for part in layer.children():
                # Not the norms, whose weights are vectors
                if any(parameter.ndim > 1 for parameter in part.parameters()):
                    part.register_forward_hook(self._drop)

    def _drop(self, part: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        return (self.dropout(output[0]), *output[1:]) if isinstance(output, tuple) else self.dropout(output)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(rows, 2)` for right-padded rows."""
        embeddings = self.dropout(self.backbone.get_input_embeddings()(input_ids))
        states = self.backbone(inputs_embeds=embeddings, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        state = states[torch.arange(len(last), device=last.device), last]
        return self.head(self.dropout(state)).float()

    def rows(self, pairs: Sequence[TokenizedPair], chosen_first: Sequence[bool]) -> dict[str, torch.Tensor]:
        """Inputs in which the chosen completion stands in the first place, or in the second."""
        device = self.head.weight.device
        tokens = [
            torch.tensor(prompt + (chosen + rejected if first else rejected + chosen), device=device)
            for (prompt, chosen, rejected), first in zip(pairs, chosen_first, strict=True)
        ]
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        return {"input_ids": pad_sequence(tokens, batch_first=True), "attention_mask": mask}


def fit(
    classifier: PairClassifier, pairs: Sequence[TokenizedPair], epochs: int, learning_rate: float, batch_size: int
) -> float:
    """
    Train on labeled pairs: cross-entropy, the chosen completion in the first or the second place at random.

    Order, places and dropout come from PyTorch's global generators.

    Args:
        classifier ([`PairClassifier`]):
            Changed in place.
        pairs (`Sequence[TokenizedPair]`):
            Pairs as they are labeled.
        epochs (`int`), learning_rate (`float`), batch_size (`int`):
            Of AdamW, at a constant rate.

    Returns:
        `float`: mean loss of the last epoch, in nats.
    """
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    classifier.train()
    for _ in range(epochs):
        losses = []
        for places in torch.randperm(len(pairs)).split(batch_size):
            batch = [pairs[i] for i in places.tolist()]
            second = torch.randint(2, (len(batch),))
            logits = classifier(**classifier.rows(batch, (second == 0).tolist()))
            loss = F.cross_entropy(logits, second.to(logits.device))
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def label_probabilities(
    classifier: PairClassifier, pairs: Sequence[TokenizedPair], passes: int, batch_size: int
) -> torch.Tensor:
    """
    Monte-Carlo-dropout probabilities that each pair's chosen completion is the better one.

    Each is the mean over both orders of the two completions, so that a preference for a place cancels. Dropout is on
    and comes from PyTorch's global generators, with a mask of its own for each pass, pair and order.

    Args:
        classifier ([`PairClassifier`]):
            Trained.
        pairs (`Sequence[TokenizedPair]`):
            Pairs to look at.
        passes (`int`):
            T.
        batch_size (`int`):
            Rows per forward.

    Returns:
        `torch.Tensor` of shape `(passes, pairs)`, on the CPU.
    """
    classifier.train()
    lengths = [sum(map(len, pair)) for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    probabilities = torch.empty(passes, len(pairs))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [pairs[i] for i in places]
        first, second = (classifier.rows(batch, [chosen_first] * len(batch)) for chosen_first in (True, False))
        for t in range(passes):
            in_first, in_second = classifier(**first).softmax(1)[:, 0], classifier(**second).softmax(1)[:, 1]
            probabilities[t, places] = ((in_first + in_second) / 2).cpu()
    return probabilities
