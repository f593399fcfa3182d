"""Names that sd-scripts knows: the host ignores other keys of a --config_file silently, and refuses them in a data set.

Union of v0.9.1 to v0.11.1; a test compares it with the checkouts that it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spf_plugin.hosts.kohya.cached_text import TEXT_CACHES
from spf_plugin.hosts.kohya.scripts import LENGTHS, SCRIPTS, Script
from spf_plugin.tools.check import dit_options as dit

# Options of train_network.py and sdxl_train_network.py, by what their parsers take for a value. All other trainers
# have them too, and more (`dit_options`).
_SWITCHES = """
    alpha_mask async_upload bucket_no_upscale cache_info cache_latents cache_latents_to_disk
    cache_text_encoder_outputs cache_text_encoder_outputs_to_disk color_aug console_log_simple
    cpu_offload_checkpointing ddp_gradient_as_bucket_view ddp_static_graph debiased_estimation_loss
    debug_dataset deepspeed dim_from_weights disable_mmap_load_safetensors enable_bucket enable_wildcard
    flip_aug fp16_master_weights_and_gradients fp8_base fp8_base_unet full_bf16 full_fp16 fused_backward_pass
    gradient_checkpointing highvram ip_noise_gamma_random_strength log_config lowram masked_loss mem_eff_attn
    network_train_text_encoder_only network_train_unet_only no_half_vae no_metadata noise_offset_random_strength
    output_config persistent_data_loader_workers random_crop resume_from_huggingface sample_at_first save_state
    save_state_on_train_end save_state_to_huggingface scale_v_pred_loss_like_noise_pred sdpa shuffle_caption
    skip_cache_check skip_until_initial_step torch_compile train_inpainting use_8bit_adam use_lion_optimizer v2
    v_parameterization weighted_captions xformers zero3_init_flag zero3_save_16bit_model zero_terminal_snr
"""
_TEXTS = """
    caption_extension caption_extention caption_prefix caption_separator caption_suffix conditioning_data_dir
    config_file console_log_file console_log_level dataset_class dataset_config dynamo_backend
    face_crop_aug_range huber_schedule huggingface_path_in_repo huggingface_repo_id huggingface_repo_type
    huggingface_repo_visibility huggingface_token in_json keep_tokens_separator log_prefix log_tracker_config
    log_tracker_name log_with logging_dir loss_type lr_scheduler lr_scheduler_type metadata_author
    metadata_description metadata_is_negative_embedding metadata_license metadata_merged_from
    metadata_preprocessor metadata_tags metadata_thumbnail metadata_title metadata_trigger_phrase
    metadata_usage_hint mixed_precision network_module network_weights offload_optimizer_device
    offload_optimizer_nvme_path offload_param_device offload_param_nvme_path optimizer_type output_dir
    output_name pretrained_model_name_or_path reg_data_dir resize_interpolation resolution resume sample_prompts
    sample_sampler save_model_as save_precision secondary_separator skip_image_resolution tokenizer_cache_dir
    train_data_dir training_comment vae wandb_api_key wandb_run_name
"""
_WHOLE = """
    bucket_reso_steps caption_dropout_every_n_epochs clip_skip dataset_repeats ddp_timeout
    gradient_accumulation_steps initial_epoch initial_step keep_tokens lr_scheduler_num_cycles
    lr_scheduler_timescale max_bucket_reso max_data_loader_n_workers max_timestep max_token_length
    max_train_epochs max_train_steps max_validation_steps min_bucket_reso min_timestep multires_noise_iterations
    network_dim sample_every_n_epochs sample_every_n_steps save_every_n_epochs save_every_n_steps
    save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_n_epoch_ratio
    seed token_warmup_min train_batch_size vae_batch_size validate_every_n_epochs validate_every_n_steps
    validation_seed zero_stage
"""
_DECIMALS = """
    adaptive_noise_scale caption_dropout_rate caption_tag_dropout_rate huber_c huber_scale ip_noise_gamma
    learning_rate lr_scheduler_min_lr_ratio lr_scheduler_power max_grad_norm min_snr_gamma
    multires_noise_discount network_alpha network_dropout noise_offset prior_loss_weight scale_weight_norms
    token_warmup_step unet_lr v_pred_like_loss validation_split
"""
_WHOLE_OR_NUMBERS = "lr_decay_steps lr_warmup_steps"
_TEXT_LISTS = "base_weights lr_scheduler_args network_args optimizer_args"
_NUMBER_LISTS = "base_weights_multiplier text_encoder_lr"


def whole_or_number(text: str) -> int | float:
    """The host's own type: steps, or a share of them that is below 1 or a percentage."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if float(text) >= 1 else float(text)


SWITCHES = frozenset([*_SWITCHES.split(), *dit.SWITCHES.split()])
#: What one word of an option's value becomes.
TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys([*_TEXTS.split(), *_TEXT_LISTS.split(), *dit.TEXTS.split()], str),
    **dict.fromkeys([*_WHOLE.split(), *dit.WHOLE.split()], int),
    **dict.fromkeys([*_DECIMALS.split(), *_NUMBER_LISTS.split(), *dit.DECIMALS.split()], float),
    **dict.fromkeys(_WHOLE_OR_NUMBERS.split(), whole_or_number),
}
NUMBERS = frozenset(name for name, kind in TYPES.items() if kind is not str)
#: Options that take any number of words. v0.9.1 takes one for text_encoder_lr.
TEXTS_IN_LISTS = frozenset(_TEXT_LISTS.split())
LISTS = TEXTS_IN_LISTS | frozenset(_NUMBER_LISTS.split())
CHOICES: dict[str, tuple[Any, ...]] = {
    **dit.CHOICES,
    "console_log_level": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    "dynamo_backend": (
        "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
        "tensort", "ipex", "tvm",
    ),
    "huber_schedule": ("constant", "exponential", "snr"),
    "log_with": ("tensorboard", "wandb", "all"),
    "loss_type": ("l1", "l2", "huber", "smooth_l1"),
    "max_token_length": LENGTHS,
    "mixed_precision": ("no", "fp16", "bf16"),
    "offload_optimizer_device": ("cpu", "nvme"),
    "offload_param_device": ("cpu", "nvme"),
    "resize_interpolation": ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    "sample_sampler": (
        "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
        "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
    ),
    "save_model_as": ("ckpt", "pt", "safetensors"),
    "save_precision": ("float", "fp16", "bf16"),
    "zero_stage": (0, 1, 2, 3),
}  # fmt: skip
#: Of every trainer.
OPTIONS = SWITCHES | frozenset(TYPES)
#: Which train_network.py has not: it ignores them in a file, and refuses them on the command line.
SDXL_ONLY = (*TEXT_CACHES, "disable_mmap_load_safetensors")
#: By trainer, what it takes.
OF_SCRIPT: dict[str, frozenset[str]] = {
    script.name: OPTIONS.difference(*dit.OWN.values())
    .difference(() if script.name != "train_network" else SDXL_ONLY)
    .union(dit.OWN.get(script.name, ()))
    for script in SCRIPTS
}


def having(option: str) -> list[Script]:
    """The trainers that have an option."""
    return [script for script in SCRIPTS if option in OF_SCRIPT[script.name]]


_NUMBER = (int, float)
#: What may stand in [general], [[datasets]] and [[datasets.subsets]] alike, with its type.
ASCENDABLE: dict[str, type | tuple[type, ...]] = {
    "color_aug": bool,
    "face_crop_aug_range": list,
    "flip_aug": bool,
    "num_repeats": int,
    "random_crop": bool,
    "shuffle_caption": bool,
    "keep_tokens": int,
    "keep_tokens_separator": str,
    "secondary_separator": str,
    "caption_separator": str,
    "enable_wildcard": bool,
    "token_warmup_min": int,
    "token_warmup_step": _NUMBER,
    "caption_prefix": str,
    "caption_suffix": str,
    "caption_dropout_every_n_epochs": int,
    "caption_dropout_rate": _NUMBER,
    "caption_tag_dropout_rate": _NUMBER,
    "caption_extension": str,
    "class_tokens": str,
    "cache_info": bool,
    "custom_attributes": dict,  # from 2025 on
    "resize_interpolation": str,  # from 2025 on
}
#: What may stand in [general] and [[datasets]].
DATASET: dict[str, type | tuple[type, ...]] = {
    **ASCENDABLE,
    "batch_size": int,
    "bucket_no_upscale": bool,
    "bucket_reso_steps": int,
    "enable_bucket": bool,
    "max_bucket_reso": int,
    "min_bucket_reso": int,
    "resolution": (int, list),
    "network_multiplier": float,
    "skip_image_resolution": (int, list),  # from v0.11 on
    "validation_seed": int,  # from 2025 on
    "validation_split": float,  # from 2025 on
}
#: What may stand in [[datasets.subsets]].
SUBSET: dict[str, type | tuple[type, ...]] = {
    **ASCENDABLE,
    "image_dir": str,
    "is_reg": bool,
    "alpha_mask": bool,
    "metadata_file": str,
    "conditioning_data_dir": str,
}
#: Three kinds of data set, each of its own class in the host.
FOLDERS, METADATA, MASKS = "folders", "metadata", "masks"
#: What a kind does not take, in its [[datasets]] or its subsets; [general] takes all.
NOT_OF: dict[str, frozenset[str]] = {
    FOLDERS: frozenset(("metadata_file", "conditioning_data_dir")),
    METADATA: frozenset(("caption_extension", "class_tokens", "cache_info", "is_reg", "conditioning_data_dir")),
    MASKS: frozenset(("class_tokens", "is_reg", "alpha_mask", "metadata_file")),
}
#: What v0.9.1 refuses in a data set and later releases take.
SINCE_2025 = ("custom_attributes", "resize_interpolation", "validation_seed", "validation_split")
#: What the host takes for resize_interpolation in a data set; its parser leaves out the last.
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
