"""The families of decoders that a Hugging Face `config.json` may be of: which fields they have, and what these mean.

One row a family. What differs is said in the fields of `ModelConfig`; `core.model.published` reads the file by it.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

ATTENTION, MLP = ("qkv_bias", "out_bias"), ("mlp_bias",)  # where a flag of the file puts biases
EVERYWHERE = ATTENTION + MLP
PLAIN = {"norm": "layer", "norm_bias": True, "gated": False}  # GPT's kind, but for what flags say of biases
STEPS = ("decoder_sparse_step", "mlp_only_layers")


NONE: Any = MappingProxyType({})


class Family(NamedTuple):
    """How a family differs from Llama."""

    architecture: str
    untrained: str = ""  # what of it the decoder here has not got, in words: it is counted only
    model: dict[str, Any] = NONE  # fields of `ModelConfig`, whatever the file says
    biases: dict[str, tuple[str, ...]] = NONE  # what a flag of the file gives biases
    names: dict[str, str] = NONE  # of sizes, where they are not Llama's; more than one are separated by |
    usual: dict[str, Any] = NONE  # what transformers takes where the file says nothing
    free: str = ""  # fields that change what is computed, and no count: known, and not read
    fixed: dict[str, tuple[Any, ...]] = NONE  # fields, and the values that are counted
    experts: str = ""  # the field that says how many
    expert_size: str = "moe_intermediate_size"  # the field that says their features,
    shared: str = ""  # and those of the shared ones: features, or, where it says so, how many experts
    mixtures: tuple[str, ...] = ()  # the fields that say which layers have experts
    window_every: int = 0  # all layers but each so-many-th see a window only; 1: all of them; 0: none
    head_dim: bool = True  # the file may say it


def names(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


def llama(architecture: str, untrained: str = "", model: dict[str, Any] | None = None, **more: Any) -> Family:
    return Family(architecture, untrained, model or {}, **{"biases": {"attention_bias": ATTENTION}} | more)


GPT = names("hidden_size=n_embd intermediate_size=n_inner num_hidden_layers=n_layer num_attention_heads=n_head "
            "max_position_embeddings=n_positions rms_norm_eps=layer_norm_epsilon")  # fmt: skip
DENSE = names("hidden_size=hidden_size|n_embed num_hidden_layers=n_layer|num_hidden_layers "
              "num_attention_heads=n_head|num_attention_heads rms_norm_eps=layer_norm_epsilon "
              "max_position_embeddings=seq_length|max_position_embeddings")  # fmt: skip
QWEN_USUAL = {"use_sliding_window": False}
QWEN_MOE = {"experts": "num_experts|num_local_experts|n_routed_experts", "mixtures": STEPS}
DEEPSEEK = {"experts": "n_routed_experts|num_local_experts", "shared": "n_shared_experts",
            "mixtures": ("first_k_dense_replace",)}  # fmt: skip
OF_ALL = {"qk_norm": True, "qk_norm_all": True}
GEMMA, GLM = {"head_dim": 256, "tie_word_embeddings": True}, {"attention_bias": True}
GEMMAS = "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar use_bidirectional_attention"
GRANITE = "embedding_multiplier logits_scaling residual_multiplier attention_multiplier"
SCALED = "factors of embeddings, attention, residuals and logits"
PART = "rotary positions of a part of a head"
PARALLEL = "attention beside the MLP"
FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel"),
    "llama": llama("LlamaForCausalLM", biases={"attention_bias": ATTENTION, "mlp_bias": MLP}),
    "mistral": Family("MistralForCausalLM", usual={"num_key_value_heads": 8}, window_every=1),
    "mixtral": Family("MixtralForCausalLM", experts="num_local_experts", expert_size="intermediate_size",
                      usual={"num_key_value_heads": 8, "rms_norm_eps": 1e-5}, window_every=1),
    "qwen2": Family("Qwen2ForCausalLM", model={"qkv_bias": True}, usual=QWEN_USUAL | {"num_key_value_heads": 32},
                    window_every=1),
    "qwen3": llama("Qwen3ForCausalLM", model={"qk_norm": True}, window_every=1,
                   usual=QWEN_USUAL | {"num_key_value_heads": 32, "head_dim": 128}),
    "qwen3_moe": llama("Qwen3MoeForCausalLM", model={"qk_norm": True}, **QWEN_MOE, window_every=1,
                       usual=QWEN_USUAL | {"num_key_value_heads": 4}),
    "deepseek_v3": llama("DeepseekV3ForCausalLM", **DEEPSEEK, usual={
        "norm_topk_prob": True, "first_k_dense_replace": 3, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "q_lora_rank": 1536, "routed_scaling_factor": 2.5}),
    # Only counted.
    "qwen2_moe": Family("Qwen2MoeForCausalLM", "a gate of the shared expert", {"shared_gate": True},
                        {"qkv_bias": ("qkv_bias",)}, usual=QWEN_USUAL | {"qkv_bias": True, "num_key_value_heads": 16,
                                            "shared_expert_intermediate_size": 5632}, **QWEN_MOE,
                        shared="shared_expert_intermediate_size", window_every=2),
    "deepseek_v2": llama("DeepseekV2ForCausalLM", "weights of experts that are a softmax over all, times a scale",
                         **DEEPSEEK, fixed={"mlp_bias": (False,)}, usual={"n_shared_experts": 2, "q_lora_rank": 1536},
                         free="scoring_func topk_method"),
    "minicpm3": llama("MiniCPM3ForCausalLM", SCALED, usual={"tie_word_embeddings": True, "q_lora_rank": 768},
                      biases={"attention_bias": ATTENTION, "mlp_bias": MLP},
                      free="scale_emb scale_depth dim_model_base"),
    "qwen3_vl_text": llama("", "rotary positions in three dimensions", model={"qk_norm": True},
                           usual={"num_key_value_heads": 32, "head_dim": 128}),
    "qwen3_vl_moe_text": llama("", "rotary positions in three dimensions", model={"qk_norm": True}, **QWEN_MOE,
                               usual={"num_key_value_heads": 16, "tie_word_embeddings": True}, free="sliding_window"),
    "qwen2_5_vl_text": Family("", "rotary positions in three dimensions", {"qkv_bias": True}, window_every=1,
                              usual=QWEN_USUAL | {"num_key_value_heads": 8}),
    "gpt_neox": Family("GPTNeoXForCausalLM", PARALLEL + ", " + PART, PLAIN | {"mlp_bias": True},
                       {"attention_bias": ATTENTION}, names("rms_norm_eps=layer_norm_eps"), {"attention_bias": True},
                       "use_parallel_residual rotary_pct rotary_emb_base hidden_dropout classifier_dropout",
                       head_dim=False),
    "gpt_neo": Family("GPTNeoForCausalLM", "attention to the last tokens", PLAIN | {
        "mlp_bias": True, "out_bias": True, "learned_positions": True}, {},
        names("num_hidden_layers=num_layers num_attention_heads=num_heads rms_norm_eps=layer_norm_epsilon "
              "sliding_window=window_size"),
        {"tie_word_embeddings": True, "intermediate_size": 0, "sliding_window": 256},
        "attention_types attention_layers resid_dropout embed_dropout classifier_dropout activation_function "
        "gradient_checkpointing", head_dim=False, window_every=2),
    "gptj": Family("GPTJForCausalLM", PARALLEL + ", " + PART, PLAIN | {"mlp_bias": True, "norms": 1, "head_bias": True},
                   {}, GPT, {"intermediate_size": 0}, "rotary rotary_dim activation_function", head_dim=False),
    "codegen": Family("CodeGenForCausalLM", PARALLEL + ", " + PART,
                      PLAIN | {"mlp_bias": True, "norms": 1, "head_bias": True}, {}, GPT, {"intermediate_size": 0},
                      "rotary_dim activation_function", head_dim=False),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", "one head of keys for all with learned positions",
                          PLAIN | {"biases": True, "learned_positions": True}, {}, GPT,
                          {"intermediate_size": 0, "tie_word_embeddings": True, "multi_query": True},
                          "activation_function attention_softmax_in_fp32 scale_attention_softmax_in_fp32 "
                          "inference_runner pad_key_length pre_allocate_kv_cache validate_runner_input",
                          head_dim=False),
    "gpt_oss": llama("GptOssForCausalLM", "sinks of attention, biases of experts, swigluoai",
                     {"expert_bias": True, "router_bias": True, "sinks": True},
                     usual={"attention_bias": True, "head_dim": 64, "num_key_value_heads": 8,
                            "sliding_window": 128}, experts="num_local_experts",
                     expert_size="intermediate_size", window_every=2,
                     free="swiglu_alpha swiglu_limit experts_per_token initial_context_length"),
    "gemma": llama("GemmaForCausalLM", "scaled embeddings, GELU's gate", usual=GEMMA | {"num_key_value_heads": 16},
                   free="hidden_activation use_bidirectional_attention"),
    "gemma2": llama("Gemma2ForCausalLM", "norms after attention and MLP, capped scores, GELU's gate", {"norms": 4},
                    usual=GEMMA | {"num_key_value_heads": 4, "sliding_window": 4096},
                    free=GEMMAS + " hidden_activation cache_implementation sliding_window_size", window_every=2),
    "gemma3_text": llama("Gemma3ForCausalLM", "norms after attention and MLP, GELU's gate",
                         {"norms": 4, "qk_norm": True}, window_every=6,
                         usual=GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096,
                                        "vocab_size": 262_208, "max_position_embeddings": 131_072},
                         free=GEMMAS + " hidden_activation cache_implementation rope_local_base_freq"),
    "phi": Family("PhiForCausalLM", PARALLEL + ", " + PART, PLAIN | {"biases": True, "norms": 1, "head_bias": True},
                  {"qk_layernorm": ("qk_norm",)}, names("rms_norm_eps=layer_norm_eps"), {},
                  "embd_pdrop resid_pdrop"),
    "phi3": Family("Phi3ForCausalLM", "rotary positions scaled by length, or of a part of a head",
                   free="original_max_position_embeddings", window_every=1),
    "phimoe": Family("PhimoeForCausalLM", "LayerNorm before gated experts, sparse mixer", {"norm": "layer",
                     "norm_bias": True}, {"attention_bias": ATTENTION, "lm_head_bias": ("head_bias",)},
                     usual={"num_key_value_heads": 8}, experts="num_local_experts", expert_size="intermediate_size",
                     free="router_jitter_noise input_jitter_noise original_max_position_embeddings", window_every=1),
    "olmo": llama("OlmoForCausalLM", "norms without parameters", {"norms": 0, "outer_norms": 0}, free="clip_qkv"),
    "olmo2": llama("Olmo2ForCausalLM", "norms after attention and MLP", OF_ALL),
    "olmo3": llama("Olmo3ForCausalLM", "norms after attention and MLP", OF_ALL, usual={"sliding_window": 4096},
                   window_every=4),
    "olmoe": llama("OlmoeForCausalLM", "norms of all heads' queries and keys", OF_ALL, experts="num_experts",
                   expert_size="intermediate_size", free="clip_qkv", head_dim=False),
    "falcon": Family("FalconForCausalLM", PARALLEL, PLAIN, {"bias": EVERYWHERE},
                     names("num_hidden_layers=num_hidden_layers|n_layer num_attention_heads=num_attention_heads|n_head "
                           "num_key_value_heads=num_kv_heads|n_head_kv rms_norm_eps=layer_norm_epsilon "
                           "intermediate_size=ffn_hidden_size"),
                     {"tie_word_embeddings": True, "intermediate_size": 0, "max_position_embeddings": 2048,
                      "multi_query": True, "parallel_attn": True},
                     "alibi activation hidden_dropout apply_residual_connection_post_layernorm", head_dim=False),
    "mpt": Family("MptForCausalLM", "positions by ALiBi, LayerNorm without biases", PLAIN | {"norm_bias": False}, {},
                  names("hidden_size=d_model num_hidden_layers=n_layers num_attention_heads=n_heads "
                        "max_position_embeddings=max_seq_len rms_norm_eps=layer_norm_epsilon"),
                  {"tie_word_embeddings": True, "intermediate_size": 0},
                  "emb_pdrop init_device logit_scale verbose init_config embedding_fraction norm_type learned_pos_emb "
                  "attn_pdrop attn_impl clip_qkv softmax_scale alibi_bias_max fc_type tokenizer_name "
                  "use_pad_tok_in_ffn",
                  {"expansion_ratio": (4,), "no_bias": (True,), "qk_ln": (False,), "prefix_lm": (False,),
                   "attn_type": ("multihead_attention",), "alibi": (True,), "attn_uses_sequence_id": (False,)},
                  head_dim=False),
    "bloom": Family("BloomForCausalLM", "positions by ALiBi, a norm of the embedding",
                    PLAIN | {"biases": True, "outer_norms": 2}, {}, DENSE,
                    {"tie_word_embeddings": True, "intermediate_size": 0, "max_position_embeddings": 2048},
                    "apply_residual_connection_post_layernorm hidden_dropout slow_but_exact skip_bias_add "
                    "skip_bias_add_qkv bias_dropout_fusion masked_softmax_fusion offset_alibi "
                    "attention_softmax_in_fp32 n_inner", head_dim=False),
    "opt": Family("OPTForCausalLM", "ReLU, positions that begin at 2", PLAIN | {"learned_positions": True},
                  {"enable_bias": EVERYWHERE}, names("intermediate_size=ffn_dim rms_norm_eps=layer_norm_eps"),
                  {"tie_word_embeddings": True, "enable_bias": True}, "activation_function dropout activation_dropout "
                  "layerdrop init_std scale_embedding",
                  {"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
                   "layer_norm_elementwise_affine": (True,)}, head_dim=False),
    "starcoder2": Family("Starcoder2ForCausalLM", "LayerNorm with rotary positions and biases", PLAIN,
                         {"use_bias": EVERYWHERE}, names("rms_norm_eps=norm_epsilon"),
                         {"tie_word_embeddings": True, "use_bias": True, "num_key_value_heads": 2},
                         "residual_dropout embedding_dropout activation_function norm_type mlp_type", window_every=1),
    "cohere": llama("CohereForCausalLM", PARALLEL + ", LayerNorm without biases", {"norm": "layer", "norms": 1},
                    biases={"attention_bias": ATTENTION, "use_qk_norm": ("qk_norm", "qk_norm_all")},
                    names=names("rms_norm_eps=layer_norm_eps"), usual={"tie_word_embeddings": True},
                    free="logit_scale"),
    "cohere2": llama("Cohere2ForCausalLM", PARALLEL + ", LayerNorm without biases", {"norm": "layer", "norms": 1},
                     names=names("rms_norm_eps=layer_norm_eps"),
                     usual={"tie_word_embeddings": True, "sliding_window": 4096},
                     free="logit_scale order_of_interleaved_layers position_embedding_type rotary_pct", window_every=4),
    "glm": Family("GlmForCausalLM", PART, {}, {"attention_bias": ("qkv_bias",)},
                  usual=GLM | {"num_key_value_heads": 2, "head_dim": 128}),
    "glm4": Family("Glm4ForCausalLM", "norms after attention and MLP, " + PART, {"norms": 4},
                   {"attention_bias": ("qkv_bias",)}, usual=GLM | {"num_key_value_heads": 2, "head_dim": 128}),
    "glm4_moe": Family("Glm4MoeForCausalLM", PART, {}, {"attention_bias": ("qkv_bias",), "use_qk_norm": ("qk_norm",)},
                       usual={"num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 1}, **DEEPSEEK),
    "dots1": llama("Dots1ForCausalLM", "experts of sigmoid scores without latent attention", {"qk_norm": True},
                   **DEEPSEEK, usual={"num_key_value_heads": 32},
                   free="max_window_layers scoring_func topk_method sliding_window"),
    "granite": llama("GraniteForCausalLM", SCALED, biases={"attention_bias": ATTENTION, "mlp_bias": MLP}, free=GRANITE),
    "granitemoe": llama("GraniteMoeForCausalLM", SCALED, free=GRANITE, experts="num_local_experts",
                        expert_size="intermediate_size"),
    "granitemoeshared": llama("GraniteMoeSharedForCausalLM", SCALED, free=GRANITE, experts="num_local_experts",
                              expert_size="intermediate_size", shared="shared_intermediate_size"),
    "nemotron": Family("NemotronForCausalLM", "squared ReLU, LayerNorm without other biases", PLAIN,
                       {"attention_bias": ATTENTION, "mlp_bias": MLP}, names("rms_norm_eps=norm_eps")),
    "stablelm": Family("StableLmForCausalLM", "LayerNorm before a gate, " + PART,
                       {"norm": "layer", "norm_bias": True},
                       {"use_qkv_bias": ("qkv_bias",), "qk_layernorm": ("qk_norm", "qk_norm_all")},
                       names("rms_norm_eps=layer_norm_eps"), {"num_key_value_heads": 32},
                       "rope_pct hidden_dropout norm_eps", head_dim=False),
    "smollm3": llama("SmolLM3ForCausalLM", "layers without positions",
                     biases={"attention_bias": ATTENTION, "mlp_bias": MLP},
                     usual=QWEN_USUAL | {"tie_word_embeddings": True, "num_key_value_heads": 4},
                     free="no_rope_layers no_rope_layer_interval", window_every=1),
    "exaone4": Family("Exaone4ForCausalLM", "norms after attention and MLP", {"qk_norm": True},
                      usual={"num_key_value_heads": 32, "sliding_window": 4096}, window_every=4),
    "ernie4_5": Family("Ernie4_5ForCausalLM", "rotary positions of neighbouring features", {},
                       {"use_bias": EVERYWHERE},
                       usual={"tie_word_embeddings": True, "head_dim": 128, "num_key_value_heads": 2}),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", "rotary positions of neighbouring features",
                           {"router_bias": True},
                           {"use_bias": (*EVERYWHERE, "head_bias")}, {"num_experts_per_tok": "moe_k"},
                           usual={"tie_word_embeddings": True, "num_key_value_heads": 4, "moe_num_shared_experts": 2,
                                  "moe_layer_start_index": 1},
                           experts="moe_num_experts|num_experts", shared="moe_num_shared_experts",
                           mixtures=("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
                           free="moe_norm_min moe_capacity moe_gate moe_use_aux_free", head_dim=False),
    "hunyuan_v1_dense": llama("HunYuanDenseV1ForCausalLM", "query and key norms after rotary positions",
                              {"qk_norm": True}, free="eod_token_id use_qk_norm"),
    "seed_oss": llama("SeedOssForCausalLM", "biases of queries, keys and values beside others", biases={
        "attention_bias": ("qkv_bias",), "attention_out_bias": ("out_bias",), "mlp_bias": MLP},
        usual={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8}, free="residual_dropout"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", "norms of all heads' queries and keys", OF_ALL,
                         experts="num_local_experts", expert_size="intermediate_size",
                         usual={"num_key_value_heads": 8, "head_dim": 128},
                         free="scoring_func use_qk_norm use_routing_bias rotary_dim"),
    "dbrx": Family("DbrxForCausalLM", "LayerNorm without biases before gated experts", {"norm": "layer"}, {},
                   names("hidden_size=d_model num_hidden_layers=n_layers num_attention_heads=n_heads "
                         "max_position_embeddings=max_seq_len intermediate_size=ffn_hidden_size "
                         "num_key_value_heads=kv_n_heads|num_key_value_heads "
                         "rms_norm_eps=layer_norm_epsilon num_experts_per_tok=moe_top_k"), {},
                   "attn_pdrop emb_pdrop clip_qkv ffn_act_fn moe_jitter_eps moe_loss_weight "
                   "moe_normalize_expert_weights uniform_expert_assignment", {"tie_word_embeddings": (False,)},
                   experts="moe_num_experts", expert_size="intermediate_size", head_dim=False),
    "llama4_text": llama("Llama4ForCausalLM", "norms of heads without parameters, layers without positions",
                         names={"intermediate_size": "intermediate_size_mlp", "expert_size": "intermediate_size"},
                         experts="num_local_experts", expert_size="expert_size", shared="expert_size",
                         mixtures=("interleave_moe_layer_step", "moe_layers"), window_every=4,
                         usual={"num_key_value_heads": 8, "head_dim": 128},
                         free="use_qk_norm no_rope_layers no_rope_layer_interval attn_temperature_tuning floor_scale "
                         "attn_scale for_llm_compressor router_jitter_noise"),
}  # fmt: skip
# Other names of the same text model: as remote code, or with a `text_config`, or beside fields of an encoder.
SAME = {"kimi_k2": "deepseek_v3", "phi4": "phi3", "ministral": "mistral", "gemma3": "gemma3_text",
        "qwen2_vl": "qwen2_5_vl_text", "qwen2_vl_text": "qwen2_5_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}  # fmt: skip
# Models with a `text_config`. Where they say whether the head is the embedding: in both, and either is enough; in the
# text_config; or beside it, with the value where nothing is said.
WRAPPERS: dict[str, str | bool] = (
    dict.fromkeys(("llava", "llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl"), "either")
    | {"llama4": "text_config"}
    | dict.fromkeys(("mistral3", "gemma3", "internvl", "paligemma", "got_ocr2"), True)
    | dict.fromkeys(("llava_next", "qwen3_vl", "qwen3_vl_moe", "idefics2", "idefics3", "smolvlm", "vipllava"), False)
)
