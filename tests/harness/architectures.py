"""Every causal architecture of transformers that a tiny config can build, with random weights and no network."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, CONTEXT = 96, 64

# Whatever a config calls its sizes
_SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size", "emb_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "decoder_ffn_dim", "dim_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "shared_expert_intermediate_size", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), CONTEXT
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "sep_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input", "state_size", "mamba_d_state"), 8),
    "attention_types": [[["global", "local"], 1]],
    "is_decoder": True,
}
_DROPOUT = ("dropout", "pdrop", "dropout_prob", "dropout_rate")


# What some architectures need beside that: as many heads of every kind, layers of every kind, a single expert
ATTEMPTS = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 8},
    {"num_experts_per_tok": 1},
)


class NotBuildableError(Exception):
    """Why no tiny text model of an architecture can be made from its config alone."""


def tiny_config(architecture: str, **options):
    """A config of that model type for at most a few thousand parameters; `options` go before the sizes here."""
    try:
        default = AutoConfig.for_model(architecture)
        if default.get_text_config() is not default:
            raise NotBuildableError("multimodal")
        fixed = {name for name, value in vars(type(default)).items() if isinstance(value, property)}
        values = {name: _SIZES[name] for name in _SIZES.keys() & vars(default).keys() - fixed}
        values = {k: v for k, v in values.items() if isinstance(v, list) or not isinstance(vars(default)[k], list)}
        values |= {name: 0.0 for name, value in vars(default).items() if name.endswith(_DROPOUT) and value}
        return type(default)(**{**values, **options})
    except NotBuildableError:
        raise
    except Exception as error:
        raise NotBuildableError(f"{type(error).__name__}: {error}") from error


def tiny_architecture(config) -> PreTrainedModel:
    """A model with random weights, uneven enough that mistakes show."""
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > 20e6:
            raise NotBuildableError("too large")
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            elif not bool(parameter.isfinite().all()):
                nn.init.normal_(parameter)
        model.generation_config = GenerationConfig()
        ids = torch.arange(3, 9).unsqueeze(0)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    except NotBuildableError:
        raise
    except Exception as error:
        raise NotBuildableError(f"{type(error).__name__}: {error}") from error
    if not bool(logits.isfinite().all()):
        raise NotBuildableError("its random weights give no finite logits")
    return model
