"""A tiny model of every text architecture that the installed mlx-lm has.

What a configuration needs is read off the architecture's own `ModelArgs`: a field whose name says
a size gets the size below, another required one gets a value by its type, and the rest keep their
defaults. So an architecture that mlx-lm adds is there by itself; `OVERRIDES` says what an
architecture wants besides.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

LAYERS, HIDDEN, VOCABULARY = 2, 64, 64

SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "num_vocab", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "hidden_dim", "n_embd", "d_model", "model_dim"], HIDDEN),
    **dict.fromkeys(
        ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"], LAYERS
    ),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads"], 4),
    **dict.fromkeys(
        ["num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"], 2
    ),
    **dict.fromkeys(["head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"], 16),
    **dict.fromkeys(["swa_num_attention_heads"], 4),
    **dict.fromkeys(["swa_num_key_value_heads"], 2),
    **dict.fromkeys(
        [
            "intermediate_size",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "n_inner",
            "block_ff_dim",
            "ff_intermediate_size",
        ],
        64,
    ),
    **dict.fromkeys(
        [
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "share_expert_dim",
        ],
        32,
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"], 2
    ),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "num_shared_expert"], 1),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["moe_layer_freq", "decoder_sparse_step"], 1),
    "mlp_only_layers": [],
    "num_nextn_predict_layers": 0,
    # Attention through a low rank.
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank"], 32),
    **dict.fromkeys(["qk_rope_head_dim"], 8),
    **dict.fromkeys(["qk_nope_head_dim"], 16),
    **dict.fromkeys(["index_head_dim"], 16),
    **dict.fromkeys(["index_n_heads"], 2),
    **dict.fromkeys(["index_topk"], 4),
    # Positions.
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"], 64
    ),
    **dict.fromkeys(
        ["rope_theta", "rotary_emb_base", "rope_embedding_base", "swa_rope_theta"], 100.0
    ),
    **dict.fromkeys(["rotary_dim"], 8),
    **dict.fromkeys(["partial_rotary_factor", "rotary_pct"], 0.5),
    "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention"],
    # Windows, smaller than the sequences of the tests.
    **dict.fromkeys(
        [
            "sliding_window",
            "sliding_window_size",
            "window_size",
            "attention_window_size",
            "attention_chunk_size",
        ],
        4,
    ),
    # State space models and linear attention.
    **dict.fromkeys(
        ["state_size", "ssm_state_size", "mamba_d_state", "mamba_d_head", "mamba_head_dim"], 8
    ),
    **dict.fromkeys(["conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim", "conv_L_cache"], 3),
    **dict.fromkeys(["conv1d_width", "short_conv_kernel_size"], 3),
    "conv_window": 2,
    **dict.fromkeys(["mamba_num_heads", "mamba_n_heads"], 4),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "group_norm_size"], 2),
    "mamba_d_ssm": 32,
    "mamba_expand": 1,
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    "layer_group_size": 2,
    "time_step_rank": 4,
    "time_step_limit": (0.01, 10.0),
    **dict.fromkeys(
        ["a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"], 8
    ),
    # Multipliers that would take a tiny model's signal away.
    **dict.fromkeys(["logits_scaling", "scale_depth"], 1.0),
}

ROPES = {
    "sliding_attention": {"rope_theta": 100.0},
    "full_attention": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
}
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_layers": 4, "num_kv_reuse_layers": 2},
    "baichuan_m1": {"sliding_window_layers": [0]},
    "bailing_moe_v3": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 100.0},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "deepseek_v32": {"rope_scaling": YARN},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "gear": {"layer_types": ["conv_mixer", "full_attention"]},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 3,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 32,
        "rope_parameters": ROPES,
    },
    "glm_moe_dsa": {
        "rope_parameters": YARN,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {"rope_scaling": {"alpha": 4.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_k3": {
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 3,
            "gate_lower_bound": -5.0,
            "use_full_rank_gate": True,
        },
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "mla_use_output_gate": True,
        "routed_expert_hidden_size": 32,
        "latent_moe_use_norm": True,
        "attn_res_block_size": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1],
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 3,
        }
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": True,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [0, 1], "use_qk_norm": True},
    "longcat_flash": {
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mellum": {"rope_parameters": ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "minicpm3": {"rope_scaling": {"short_factor": 1.0, "long_factor": 1.0}},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1], "dense_intermediate_size": 64},
    "ministral3": {"rope_parameters": YARN},
    "mistral4": {"rope_parameters": YARN},
    "muse_spark": {
        "layer_rope_theta": [100.0, 0],
        "rope_parameters": {"rope_theta": 100.0},
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": no_op, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": no_op},
            }
            for no_op in (False, True)
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "layers_block_type": None,
        "layer_types": None,
        "routed_scaling_factor": 1.0,
        "moe_shared_expert_intermediate_size": 32,
    },
    "openelm": {
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.0],
        "ffn_dim_divisor": 32,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16, "mamba_step": 2},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "hidden_size": 128,
        "modules": [
            {"path": path, "block": 0, "embedding": "embed" in path, "dtype": "float16"}
            for path in ("model.embed_tokens", "model.layers.0.linear_attn.in_proj_qkv")
        ],
    },
    "qwen": {"kv_channels": 16, "intermediate_size": 128},
    "qwen3_5": {"full_attention_interval": 2, "num_experts": 0},
    "qwen3_5_moe": {"num_experts": 4},
    "qwen3_next": {"full_attention_interval": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "seed_oss": {"tie_word_embeddings": False},  # as_linear is not asked, so it does not quantize
    "spark2_5": {"rope_parameters": ROPES},
}

#: Where the text model of a wrapper has its arguments: a module, or a class of one.
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_5",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}


def architectures() -> list[str]:
    """The names of the modules that hold a model, without importing any; none without mlx-lm."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return []
    files = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.py"))
    return [f.stem for f in files if "\nclass Model(" in f.read_text("utf-8")]


def build(name: str) -> Any:
    """The architecture's model with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(configuration(name)))
    if not hasattr(model, "_no_grad"):  # it forgets to be a module
        nn.Module.__init__(model)
    if name == "phi3small":  # 100256 and up: written past the end of the logits
        model._dummy_tokenizer_ids = mx.array([0])
    return model


def configuration(name: str) -> dict[str, Any]:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    fields = [field.name for field in dataclasses.fields(module.ModelArgs)]
    if "text_config" not in fields:
        return {**_values(module.ModelArgs, name), **OVERRIDES.get(name, {})}
    inner = TEXT.get(name, name)
    text = _text_arguments(inner)
    values = {**_values(text, inner), **OVERRIDES.get(inner, {}), **OVERRIDES.get(name, {})}
    return {**values, "model_type": name, "text_config": {**values}}


def _text_arguments(name: str) -> type:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    names = ("TextArgs", "TextConfig", "TextModelArgs", "ModelArgs")
    return next(getattr(module, n) for n in names if hasattr(module, n))


def _values(arguments: type, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {"model_type": name}
    for field in dataclasses.fields(arguments):
        if field.name in SIZES:
            values[field.name] = SIZES[field.name]
        elif field.name not in values and _required(field):
            values[field.name] = _by_type(field)
    return values


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


def _by_type(field: dataclasses.Field[Any]) -> Any:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    if "bool" in kind:
        return False
    if "float" in kind:
        return 1e-5 if "eps" in field.name else 1.0
    return 1
