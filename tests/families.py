"""Tiny models of many of transformers' types, and what distilkit does with each."""

from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from distilkit.language_model import lm_of, lm_of_model
from distilkit.teacher import Teacher
from tiny import VOCABULARY

Outcome = Literal["works", "not apart", "refused"]

_COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_BASE = {**_COMMON, "initializer_range": 0.2}
_BERT = {
    **{**_BASE, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4},
    "max_position_embeddings": 80,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_WINDOW = {**_LLAMA, "sliding_window": 8}
_GPT2 = {**_BASE, "n_embd": 32, "n_head": 4, "n_positions": 80, "n_layer": 4}
_BLOOM = {**_BASE, "hidden_size": 32, "n_head": 4, "n_layer": 4}
_XLM = {**_BASE, "emb_dim": 32, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 80}
_MODERN = {**_BERT, "local_attention": 8, "cls_token_id": None, "sep_token_id": None}

FAMILIES: dict[str, tuple[Outcome, dict[str, Any]]] = {
    "albert": ("refused", {**_BERT, "embedding_size": 16}),
    "bert": ("works", _BERT),
    "big_bird": ("works", _BERT),
    "camembert": ("works", _BERT),
    "convbert": ("refused", {**_BERT, "embedding_size": 16}),
    "data2vec-text": ("works", _BERT),
    "deberta": ("not apart", _BERT),
    "deberta-v2": (
        "not apart",
        {
            **{**_BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
            **{"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
        },
    ),
    "distilbert": (
        "works",
        {**_BASE, "dim": 32, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 80, "n_layers": 4},
    ),
    "electra": ("works", {**_BERT, "embedding_size": 16}),
    "ernie": ("works", _BERT),
    "esm": ("not apart", {**_BERT, "token_dropout": True, "mask_token_id": 4}),
    "esmc": ("refused", _BERT),
    "eurobert": ("works", _LLAMA),
    "flaubert": ("refused", _XLM),
    "fnet": ("refused", _BERT),
    "gte": ("works", _BERT),
    "ibert": ("works", _BERT),
    "jina_embeddings_v3": ("works", _BERT),
    "layoutlm": ("not apart", _BERT),
    "longformer": ("not apart", {**_BERT, "attention_window": 8}),
    "luke": ("works", {**_BERT, "entity_vocab_size": 20, "entity_emb_size": 16}),
    "megatron-bert": ("works", _BERT),
    "mobilebert": ("refused", {**_BERT, "embedding_size": 16}),
    "modernbert": ("works", _MODERN),
    "mpnet": ("works", _BERT),
    "mra": ("refused", _BERT),
    "nomic_bert": ("works", _BERT),
    "nystromformer": ("refused", _BERT),
    "rembert": ("works", {**_BERT, "input_embedding_size": 16, "output_embedding_size": 24}),
    "roberta": ("works", _BERT),
    "roberta-prelayernorm": ("works", _BERT),
    "roc_bert": ("works", {**_BERT, "pronunciation_vocab_size": 20, "shape_vocab_size": 20}),
    "roformer": ("works", _BERT),
    "squeezebert": ("refused", {**_BERT, "embedding_size": 32}),
    "xlm": ("refused", _XLM),
    "xlm-roberta": ("works", _BERT),
    "xlm-roberta-xl": ("works", _BERT),
    "xmod": ("works", {**_BERT, "languages": ["en_XX"], "default_language": "en_XX"}),
    "yoso": ("refused", _BERT),
    "biogpt": ("works", _BERT),
    "bloom": ("not apart", _BLOOM),
    "codegen": ("works", {**_GPT2, "rotary_dim": 8}),
    "cohere": ("works", _LLAMA),
    "cohere2": ("works", _WINDOW),
    "ctrl": ("works", {**_GPT2, "dff": 64}),
    "ernie4_5": ("works", _LLAMA),
    "exaone4": ("works", _WINDOW),
    "falcon": ("works", _BERT),
    "falcon (alibi)": ("not apart", {**_BERT, "alibi": True}),
    "gemma": ("works", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("refused", {**_WINDOW, "head_dim": 8}),
    "gemma3_text": ("works", {**_WINDOW, "head_dim": 8}),
    "glm": ("works", {**_LLAMA, "head_dim": 8}),
    "gpt2": ("works", _GPT2),
    "gpt_bigcode": ("works", _GPT2),
    "gpt_neo": (
        "works",
        {
            **{**_BASE, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 80},
            **{"window_size": 4, "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
        },
    ),
    "gpt_neox": ("works", _BERT),
    "gptj": ("works", {**_GPT2, "rotary_dim": 8}),
    "granite": ("works", {**_LLAMA, "logits_scaling": 4.0}),
    "llama": ("works", _LLAMA),
    "mamba": ("not apart", {**_BASE, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 4}),
    "mistral": ("works", _WINDOW),
    "modernbert-decoder": (
        "works",
        {**_MODERN, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2},
    ),
    "mixtral": ("works", {**_LLAMA, "num_local_experts": 2}),
    "mpt": ("works", {**_BASE, "d_model": 32, "n_heads": 4, "max_seq_len": 80, "n_layers": 4}),
    "olmo2": ("works", _LLAMA),
    "olmo3": ("works", _WINDOW),
    "openai-gpt": ("not apart", _GPT2),
    "opt": ("works", {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "phi": ("works", _BERT),
    "phi3": ("works", _LLAMA),
    "qwen2": ("works", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("works", {**_LLAMA, "head_dim": 8}),
    "rwkv": ("not apart", {**_BASE, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4}),
    "smollm3": ("works", _LLAMA),
    "stablelm": ("works", _LLAMA),
    "starcoder2": ("works", _WINDOW),
    "xglm": (
        "works",
        {
            **{**_BASE, "d_model": 32, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 80},
            **{"num_layers": 4, "init_std": 0.2},
        },
    ),
    "xlnet": ("refused", {**_BASE, "d_model": 32, "n_head": 4, "d_inner": 64, "n_layer": 4}),
}


def build_family(name: str, **fields: Any) -> PreTrainedModel:
    """Build a model of four layers in eval mode, with norms and biases that differ between layers."""
    torch.manual_seed(0)
    model_type = name.partition(" ")[0]
    config = AutoConfig.for_model(model_type, **{**FAMILIES[name][1], **fields})
    auto = AutoModelForCausalLM if lm_of(model_type) == "clm" else AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def family_teacher(name: str, **fields: Any) -> Teacher:
    model = build_family(name, **fields).requires_grad_(False)
    return Teacher(model=model, name=f"tiny-{name}", revision="main", lm=lm_of_model(model), sha256="0" * 64)


def table() -> str:
    """Return README's table of families, in markdown."""
    titles = {
        "works": "cut, trained, exported and loaded again",
        "not apart": "the same, but only with `data.attend_across_documents=true`",
        "refused": "refused before training, in one sentence",
    }
    rows = [
        f"| {title} | {', '.join(f'`{name}`' for name, (found, _) in sorted(FAMILIES.items()) if found == outcome)} |"
        for outcome, title in titles.items()
    ]
    return "\n".join(["| what happens | model types of transformers |", "|---|---|", *rows])
