"""Text: encoders, decoders, encoder-decoders, mixtures of experts, state spaces."""

from __future__ import annotations

from typing import Any

from tests.networks.common import LABELS, WORDS, Network, hugging, padded, translated, words

ENCODER: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 24, "num_labels": LABELS, "pad_token_id": None,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "use_cache": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
BOTH = ("input_ids", "attention_mask")


def _encoder(name: str, head: str = "ForSequenceClassification", **settings: Any) -> Network:
    return hugging(
        "text encoder", f"{name}Config", f"{name}{head}", padded, loss="cross-entropy", sequence=BOTH,
        **{**ENCODER, **settings},
    )  # fmt: skip


def _decoder(
    name: str, config: str = "", kind: str = "text decoder", head: str = "ForCausalLM", **settings: Any
) -> Network:
    given = {k: v for k, v in {**DECODER, **settings}.items() if v != "absent"}
    return hugging(
        kind, config or f"{name}Config", f"{name}{head}", words, loss="cross-entropy", sequence=BOTH, **given
    )


def _translator(name: str, head: str = "ForConditionalGeneration", **settings: Any) -> Network:
    return hugging(
        "encoder-decoder", f"{name}Config", f"{name}{head}", translated, loss="cross-entropy",
        fixed={"use_cache": False}, **settings,
    )  # fmt: skip


BART: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 24,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip

NETWORKS: dict[str, Network] = {
    "bert": _encoder("Bert"),
    "bert-mlm": _encoder("Bert", "ForMaskedLM"),
    "distilbert": _encoder("DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "roberta": _encoder("Roberta", pad_token_id=1),
    "deberta-v2": _encoder(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", conv_kernel_size=3,
    ),
    "deberta": _encoder("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"], pad_token_id=0),
    "albert": _encoder("Albert", embedding_size=16),
    "electra": _encoder("Electra", embedding_size=16),
    "mpnet": _encoder("MPNet", pad_token_id=1),
    "roformer": _encoder("RoFormer", embedding_size=32),
    "modernbert": _encoder("ModernBert", global_attn_every_n_layers=2, local_attention=4, pad_token_id=0),
    "fnet": hugging(
        "text encoder", "FNetConfig", "FNetForSequenceClassification",
        lambda rng: {"input_ids": words(rng)["input_ids"]}, loss="cross-entropy", **ENCODER,
    ),
    "squeezebert": _encoder("SqueezeBert", embedding_size=32, q_groups=2, k_groups=2, v_groups=2, output_groups=1),
    "convbert": _encoder("ConvBert", embedding_size=32, conv_kernel_size=3, head_ratio=2),
    "nystromformer": _encoder("Nystromformer", num_landmarks=7, segment_means_seq_len=7, pad_token_id=1),
    "xlm-roberta": _encoder("XLMRoberta", "ForTokenClassification", pad_token_id=1),
    "funnel": hugging(
        "text encoder", "FunnelConfig", "FunnelForMaskedLM", words, loss="cross-entropy",
        vocab_size=WORDS, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=48, num_decoder_layers=1,
    ),
    "xlnet": hugging(
        "text decoder", "XLNetConfig", "XLNetLMHeadModel", padded, loss="cross-entropy", vocab_size=WORDS,
        d_model=32, n_layer=2, n_head=2, d_inner=48, use_mems_eval=False,
    ),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=4),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma2": _decoder("Gemma2", head_dim=8, sliding_window=4),
    "gemma3": _decoder("Gemma3", config="Gemma3TextConfig", head_dim=8, sliding_window=4),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3"),
    "cohere": _decoder("Cohere"),
    "olmo2": _decoder("Olmo2"),
    "glm": _decoder("Glm", head_dim=8),
    "stablelm": _decoder("StableLm"),
    "starcoder2": _decoder("Starcoder2"),
    "granite": _decoder("Granite"),
    "nemotron": _decoder("Nemotron"),
    "smollm3": _decoder("SmolLM3"),
    "gpt2": _decoder("GPT2", head="LMHeadModel", n_embd=32, n_layer=2, n_head=2, n_positions=24),
    "gpt-neo": _decoder("GPTNeo", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=2, window_size=4),
    "gpt-neox": _decoder("GPTNeoX", rotary_pct=0.25),
    "gptj": _decoder("GPTJ", n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=24),
    "codegen": _decoder("CodeGen", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=24),
    "gpt-bigcode": _decoder("GPTBigCode", n_embd=32, n_layer=2, n_head=2, n_positions=24),
    "opt": _decoder("OPT", ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    "bloom": _decoder("Bloom", n_layer=2, n_head=4),
    "mpt": _decoder("Mpt", d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=24),
    "falcon": _decoder("Falcon", alibi=False, new_decoder_architecture=False),
    "biogpt": _decoder("BioGpt", pad_token_id=1),
    "mixtral": _decoder("Mixtral", kind="mixture of experts", num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": _decoder(
        "Qwen2Moe", kind="mixture of experts", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "deepseek-v3": _decoder(
        "DeepseekV3", kind="mixture of experts", moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
    ),
    "mamba": hugging(
        "state space", "MambaConfig", "MambaForCausalLM", lambda rng: {"input_ids": words(rng)["input_ids"]},
        loss="cross-entropy", fixed={"use_cache": False}, vocab_size=WORDS, hidden_size=16, state_size=4,
        num_hidden_layers=2, time_step_rank=2, tie_word_embeddings=False, pad_token_id=None,
    ),
    "mamba2": hugging(
        "state space", "Mamba2Config", "Mamba2ForCausalLM", lambda rng: {"input_ids": words(rng)["input_ids"]},
        loss="cross-entropy", fixed={"use_cache": False}, vocab_size=WORDS, hidden_size=16, state_size=4,
        num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2, chunk_size=4, tie_word_embeddings=False,
        pad_token_id=None,
    ),
    "rwkv": hugging(
        "state space", "RwkvConfig", "RwkvForCausalLM", lambda rng: {"input_ids": words(rng)["input_ids"]},
        loss="cross-entropy", fixed={"use_cache": False}, vocab_size=WORDS, hidden_size=32, num_hidden_layers=2,
        attention_hidden_size=32, intermediate_size=48, context_length=16,
    ),
    "recurrent-gemma": _decoder(
        "RecurrentGemma", kind="state space", lru_width=32, attention_window_size=8, head_dim=8, conv1d_width=2,
        block_types=["recurrent", "attention"],
    ),
    "jamba": _decoder(
        "Jamba", kind="state space", num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False,
    ),
    "t5": _translator(
        "T5", vocab_size=WORDS, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0,
    ),
    "t5-gated": _translator(
        "T5", vocab_size=WORDS, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    ),
    "bart": _translator("Bart", **BART),
    "marian": _translator("Marian", "MTModel", **BART),
    "pegasus": _translator("Pegasus", **BART),
    "mbart": _translator("MBart", **BART),
    "m2m100": _translator("M2M100", **BART),
    "led": _translator("LED", **{**BART, "attention_window": 4, "max_encoder_position_embeddings": 24,
                                 "max_decoder_position_embeddings": 24}),
    "longt5": _translator(
        "LongT5", vocab_size=WORDS, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, local_radius=3,
        relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
