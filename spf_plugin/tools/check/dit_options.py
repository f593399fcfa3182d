"""Names that only sd-scripts' trainers of diffusion transformers know, beside all that the UNets' know.

Union of main of February 2026 and v0.11.1; a test compares it with the checkouts that it finds.
"""

from __future__ import annotations

from typing import Any

# Options by what their parsers take for a value.
SWITCHES = """
    apply_lg_attn_mask apply_t5_attn_mask compile compile_fullgraph cuda_allow_tf32 cuda_cudnn_benchmark
    enable_scaled_pos_embed fp8_scaled fp8_vl qwen_image_vae_2d save_clip save_t5xxl split_attn split_mode
    text_encoder_cpu unsloth_offload_checkpointing use_flash_attn use_sage_attn vae_disable_cache
"""
TEXTS = """
    ae attn_mode byt5 clip_g clip_l compile_backend compile_dynamic compile_mode controlnet_model_name_or_path
    gemma2 llm_adapter_path model_prediction_type model_type qwen3 show_timesteps show_timesteps_resolution
    system_prompt t5_tokenizer_path t5xxl t5xxl_device t5xxl_dtype text_encoder timestep_sampling weighting_scheme
"""
WHOLE = """
    blocks_to_swap compile_cache_size_limit gemma2_max_token_length qwen3_max_token_length sample_batch_size
    t5_max_token_length t5xxl_max_token_length text_encoder_batch_size vae_chunk_size
"""
DECIMALS = """
    clip_g_dropout_rate clip_l_dropout_rate cross_attn_lr discrete_flow_shift guidance_scale llm_adapter_lr
    logit_mean logit_std mlp_lr mod_lr mode_scale pos_emb_random_crop_rate self_attn_lr sigmoid_scale
    t5_dropout_rate training_shift
"""
CHOICES: dict[str, tuple[Any, ...]] = {
    "attn_mode": ("torch", "xformers", "flash", "sageattn", "sdpa"),
    "compile_dynamic": ("true", "false", "auto"),
    "compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "model_prediction_type": ("raw", "additive", "sigma_scaled"),
    "model_type": ("flux", "chroma"),
    "show_timesteps": ("console", "image"),
    "timestep_sampling": ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"),  # Lumina has them all
    "weighting_scheme": ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
}
_ALL = """
    blocks_to_swap logit_mean logit_std mode_scale show_timesteps show_timesteps_resolution text_encoder_batch_size
    weighting_scheme
"""
_OWN = {
    "anima_train_network": """
        attn_mode compile compile_backend compile_cache_size_limit compile_dynamic compile_fullgraph compile_mode
        cross_attn_lr cuda_allow_tf32 cuda_cudnn_benchmark discrete_flow_shift llm_adapter_lr llm_adapter_path mlp_lr
        mod_lr qwen3 qwen3_max_token_length qwen_image_vae_2d self_attn_lr sigmoid_scale split_attn
        t5_max_token_length t5_tokenizer_path timestep_sampling unsloth_offload_checkpointing vae_chunk_size
        vae_disable_cache
    """,
    "sd3_train_network": """
        apply_lg_attn_mask apply_t5_attn_mask clip_g clip_g_dropout_rate clip_l clip_l_dropout_rate
        enable_scaled_pos_embed pos_emb_random_crop_rate save_clip save_t5xxl t5_dropout_rate t5xxl t5xxl_device
        t5xxl_dtype t5xxl_max_token_length training_shift
    """,
    "flux_train_network": """
        ae apply_t5_attn_mask clip_l controlnet_model_name_or_path discrete_flow_shift guidance_scale
        model_prediction_type model_type sigmoid_scale split_mode t5xxl t5xxl_max_token_length timestep_sampling
    """,
    "lumina_train_network": """
        ae discrete_flow_shift gemma2 gemma2_max_token_length model_prediction_type sample_batch_size sigmoid_scale
        system_prompt timestep_sampling use_flash_attn use_sage_attn
    """,
    "hunyuan_image_train_network": """
        attn_mode byt5 discrete_flow_shift fp8_scaled fp8_vl model_prediction_type sigmoid_scale split_attn
        text_encoder text_encoder_cpu timestep_sampling vae_chunk_size
    """,
}
#: By trainer, what it takes beside all options of the SDXL trainer.
OWN = {script: frozenset([*own.split(), *_ALL.split()]) for script, own in _OWN.items()}
#: Files of a model, which tell its kind: each trainer has some of them.
MODEL_FILES = ("ae", "byt5", "clip_g", "clip_l", "gemma2", "qwen3", "t5xxl", "text_encoder")
#: What these trainers take and never look at: their noise is a flow's, their text's length has options of its own.
UNUSED = (
    "adaptive_noise_scale", "clip_skip", "debiased_estimation_loss", "max_token_length", "min_snr_gamma",
    "multires_noise_iterations", "noise_offset", "scale_v_pred_loss_like_noise_pred", "v2", "v_parameterization",
    "v_pred_like_loss", "zero_terminal_snr",
)  # fmt: skip
#: The same of one trainer.
UNUSED_BY = {"anima_train_network": ("fp8_base", "fp8_base_unet")}
