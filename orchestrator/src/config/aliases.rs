//! Names that other frameworks use for what a key here does; an unknown key that is one of them is told its name here.

/// Our key for `name`, if another framework calls something of ours that.
pub fn lookup(name: &str) -> Option<&'static str> {
    let plain = name.to_ascii_lowercase().replace('-', "_");
    ALIASES.iter().find(|(_, theirs)| theirs.contains(&plain.as_str())).map(|(ours, _)| *ours)
}

/// Our key, and what verl, TRL, prime-rl, OpenRLHF, NeMo RL, slime, AReaL, SkyRL, ROLL, PipelineRL and open-instruct call it.
pub const ALIASES: &[(&str, &[&str])] = &[
    (
        "prompts.group_size",
        &[
            "num_generations",
            "n_samples_per_prompt",
            "num_generations_per_prompt",
            "num_samples_per_prompt",
            "num_samples_per_prompt_rollout",
            "rollouts_per_example",
            "n",
            "num_rollouts",
        ],
    ),
    (
        "learner.groups_per_step",
        &[
            "train_batch_size",
            "generation_batch_size",
            "batch_size",
            "num_prompts_per_step",
            "rollout_batch_size",
            "num_unique_prompts_rollout",
            "prompts_per_step",
            "global_batch_size",
        ],
    ),
    (
        "learner.clip_low",
        &["epsilon", "clip_ratio", "clip_ratio_low", "eps_clip", "ratio_clip_min", "cliprange"],
    ),
    ("learner.clip_high", &["epsilon_high", "clip_ratio_high", "eps_clip_high", "ratio_clip_max"]),
    ("learner.dual_clip", &["clip_ratio_c", "delta", "ratio_clip_c", "eps_clip_c"]),
    (
        "learner.kl_coef",
        &[
            "beta",
            "kl_loss_coef",
            "init_coef",
            "init_kl_coef",
            "reference_policy_kl_penalty",
            "kl_beta",
            "kl_tau",
        ],
    ),
    ("learner.kl_placement", &["use_kl_in_reward", "use_kl_loss"]),
    ("learner.reference_every", &["ref_model_sync_steps", "ref_update_every", "sync_ref_model"]),
    ("learner.gae_lambda", &["lam", "lambd", "gae_lam"]),
    ("learner.value_clip", &["cliprange_value", "value_clip_eps"]),
    ("learner.critic_learning_rate", &["critic_lr", "value_learning_rate"]),
    ("learner.kl_estimator", &["kl_loss_type", "estimator", "kl_penalty", "reference_policy_kl_type"]),
    ("learner.advantage", &["adv_estimator", "scale_rewards", "advantage_estimator"]),
    ("learner.loss_aggregation", &["loss_agg_mode", "loss_type", "loss_reduction"]),
    ("learner.objective", &["policy_loss", "loss_fn", "algorithm", "algo"]),
    ("learner.entropy_coef", &["entropy_coeff", "entropy_loss_coef", "entropy_bonus"]),
    ("learner.is_cap", &["tis_clip", "is_correction_threshold", "rollout_is_threshold", "tis_imp_ratio_cap"]),
    (
        "learner.max_staleness",
        &[
            "max_off_policy_steps",
            "max_off_policy_threshold",
            "staleness_threshold",
            "async_queue_size",
            "max_head_offpolicyness",
            "max_trajectory_age_steps",
            "max_staleness_steps",
            "max_lag",
            "async_steps",
            "async_generation_ratio",
            "async_level",
            "max_async_level",
        ],
    ),
    (
        "learner.publish_every",
        &[
            "trigger_parameter_sync_step",
            "parameter_sync_step",
            "weight_sync_steps",
            "update_weights_interval",
            "weight_update_interval",
            "vllm_sync_every",
        ],
    ),
    (
        "actor.in_flight",
        &["partial_rollout", "partial_rollout_enable", "in_flight_weight_updates", "inflight_updates"],
    ),
    (
        "actor.max_new_tokens",
        &[
            "max_response_length",
            "max_completion_length",
            "max_completion_tokens",
            "response_length",
            "max_tokens",
            "max_gen_len",
            "rollout_max_response_len",
        ],
    ),
    ("actor.processes", &["num_actors", "rollout_num_engines", "vllm_num_engines", "num_engines"]),
    ("actor.max_live", &["max_num_seqs", "max_num_sequences", "max_running_requests"]),
    ("actor.prefill_tokens", &["max_num_batched_tokens", "chunked_prefill_size"]),
    ("learner.learning_rate", &["lr", "learning_rate_init", "actor_learning_rate"]),
    ("learner.max_grad_norm", &["grad_clip", "max_norm", "clip_grad", "gradient_clipping", "grad_norm_clip"]),
    ("learner.warmup_steps", &["lr_warmup_steps", "num_warmup_steps", "lr_warmup_iters"]),
    ("learner.schedule", &["lr_scheduler_type", "lr_scheduler", "lr_decay_style"]),
    (
        "learner.steps",
        &["max_steps", "total_training_steps", "num_train_steps", "num_rollout", "total_steps"],
    ),
    ("learner.checkpoint_every", &["save_freq", "save_steps", "save_interval", "ckpt_interval"]),
    ("learner.checkpoint_shard_mib", &["max_shard_size", "shard_size"]),
    ("learner.keep_last", &["save_total_limit", "max_ckpt_to_keep", "max_ckpt_num"]),
    ("learner.micro_batch_tokens", &["ppo_max_token_len_per_gpu", "max_tokens_per_gpu", "micro_batch_size"]),
    ("eval.every", &["test_freq", "eval_steps", "eval_interval", "eval_every"]),
    ("run.name", &["experiment_name", "run_name", "exp_name", "trial_name"]),
    ("run.dir", &["output_dir", "save_dir", "default_local_dir", "log_dir"]),
    ("model.path", &["model_name_or_path", "model_name", "hf_checkpoint", "pretrain", "base_model"]),
    ("prompts.file", &["train_files", "dataset_name", "prompt_data", "data_path", "dataset", "train_file"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_alias_names_two_keys() {
        let mut all: Vec<&str> = ALIASES.iter().flat_map(|(_, theirs)| theirs.iter().copied()).collect();
        all.sort_unstable();
        let twice: Vec<_> = all.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(twice.is_empty(), "{twice:?}");
    }

    #[test]
    fn spelling_of_dashes_does_not_matter() {
        assert_eq!(lookup("n-samples-per-prompt"), Some("prompts.group_size"));
        assert_eq!(lookup("num_generations"), Some("prompts.group_size"));
        assert_eq!(lookup("nonsense"), None);
    }
}
