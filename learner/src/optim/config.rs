//! Keys of the optimiser, the same in every section that trains.

use freewheel_model::{MetaP, ParamLayout, TrainOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::select::Selector;

/// How the weights move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Adam with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101).
    #[default]
    Adamw,
    /// Orthogonalised momentum on the matrices of attention, MLPs and experts (Jordan et al. 2024); AdamW on all else.
    Muon,
    /// The sign of a moment (Chen et al., arXiv 2302.06675). Wants a third to a tenth of AdamW's rate and `beta2` = 0.99.
    Lion,
    /// Gradient descent, with momentum if set.
    Sgd,
}

/// In what the moments are kept between updates; the arithmetic is f32 always, and so are the masters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StateType {
    /// 32-bit floats.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// bfloat16, rounded at random so that small changes add up.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8-bit floats with a scale for each 256 values (after Dettmers et al., arXiv 2110.02861), rounded at random.
    #[serde(rename = "8bit")]
    EightBit,
}

/// Length of an orthogonalised step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MuonScale {
    /// 0.2·√(larger side): steps as long as AdamW's, so that one learning rate suits both (Liu et al., arXiv 2502.16982).
    #[default]
    MatchRmsAdamw,
    /// √max(1, outputs/inputs), as first published.
    Original,
}

/// Settings of some of the parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Which: a kind ("embedding", "head", "norm", "bias", "attention", "mlp", "expert", "router", "position", "vision"), a
    /// tensor's name, or a pattern of names with `*`.
    pub params: String,
    /// Factor on the learning rate. 0 or more; 0 freezes them. Default 1.
    #[serde(default = "one")]
    pub lr_scale: f64,
    /// Decoupled weight decay of these, vectors included. 0 or more. Default: the section's.
    #[serde(default)]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// What every optimiser's section has beside its rates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// `adamw` (default), `muon`, `lion` or `sgd`.
    pub optimizer: OptimizerKind,
    /// Epsilon of AdamW. Above 0. Default 1e-8.
    #[schemars(range(min = 0))]
    pub eps: f64,
    /// Momentum of `muon` and `sgd`. In [0, 1). Default: 0.95 for `muon`, 0 for `sgd`.
    #[schemars(range(min = 0, max = 1))]
    pub momentum: Option<f64>,
    /// Whether `muon` and `sgd` with momentum look ahead. Default true.
    pub nesterov: bool,
    /// Length of a step of `muon`: `match_rms_adamw` (default) or `original`.
    pub muon_scale: MuonScale,
    /// In what the moments are kept: `f32` (default), `bf16` or `8bit`.
    pub optimizer_state: StateType,
    /// Rates and decay of some of the parameters; the first group that a tensor fits counts.
    pub param_groups: Vec<ParamGroup>,
    /// Parameters that keep their values: kinds, names or patterns as in `param_groups`.
    pub freeze: Vec<String>,
    /// Rank of low-rank adapters (LoRA), which are then trained in place of the weights; 0 trains the weights. Default 0.
    #[schemars(range(max = 4096))]
    pub lora_rank: usize,
    /// Adapters are multiplied with `lora_alpha` / `lora_rank`. Above 0. Default: twice the rank.
    #[schemars(range(min = 0))]
    pub lora_alpha: Option<f64>,
    /// Matrices that get an adapter: kinds, names or patterns as in `param_groups`. Default ["attention", "mlp", "expert"].
    pub lora_targets: Vec<String>,
    /// Width of the model that the learning rate was found on: rates of larger ones follow by MetaP. Needs a model made with the
    /// same base (`freewheel init-model --metap-base-width`). Above 0. Default: rates are as given.
    #[schemars(range(min = 1))]
    pub metap_base_width: Option<usize>,
    /// Layers of that model. Above 0. Required with `metap_base_width`.
    #[schemars(range(min = 1))]
    pub metap_base_layers: Option<usize>,
    /// Weight of the load-balancing loss of routers (E·Σ f·P, mean over layers). 0 or more. Default 0.
    #[schemars(range(min = 0))]
    pub balance_coef: f64,
    /// Weight of the z-loss of routers, which keeps their logits small. 0 or more. Default 0.
    #[schemars(range(min = 0))]
    pub router_z_coef: f64,
    /// What each expert's score correction moves by in an update, up if the expert had less than its share, down if more; for models
    /// that have such corrections (DeepSeek-V3, where 0.001 was used). 0 or more. Default 0.
    #[schemars(range(min = 0))]
    pub router_bias_rate: f64,
    /// Keep only what enters each layer and compute the rest again for the gradient: less memory, about a third more arithmetic, the
    /// same bits. Default false.
    pub recompute_layers: bool,
    /// Whether the image encoder keeps its weights; the projector behind it is trained. Only matters for models that read
    /// images. Default false.
    pub freeze_vision: bool,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            optimizer: OptimizerKind::Adamw,
            eps: 1e-8,
            momentum: None,
            nesterov: true,
            muon_scale: MuonScale::MatchRmsAdamw,
            optimizer_state: StateType::F32,
            param_groups: Vec::new(),
            freeze: Vec::new(),
            lora_rank: 0,
            lora_alpha: None,
            lora_targets: ["attention", "mlp", "expert"].map(str::to_owned).to_vec(),
            metap_base_width: None,
            metap_base_layers: None,
            balance_coef: 0.0,
            router_z_coef: 0.0,
            router_bias_rate: 0.0,
            recompute_layers: false,
            freeze_vision: false,
        }
    }
}

impl OptimizerConfig {
    /// Everything wrong with the keys, one line each, naming the key in `section`. Empty: all is well.
    pub fn problems(&self, section: &str) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |good: bool, key: &str, value: String, limit: &str| {
            if !good {
                problems.push(format!("{section}.{key} is {value}, outside {limit}"));
            }
        };
        check(self.eps.is_finite() && self.eps > 0.0, "eps", self.eps.to_string(), "finite values above 0");
        if let Some(momentum) = self.momentum {
            check((0.0..1.0).contains(&momentum), "momentum", momentum.to_string(), "0 to below 1");
        }
        check(self.lora_rank <= 4096, "lora_rank", self.lora_rank.to_string(), "0 to 4096");
        if let Some(alpha) = self.lora_alpha {
            check(alpha.is_finite() && alpha > 0.0, "lora_alpha", alpha.to_string(), "finite values above 0");
        }
        for (key, value) in [
            ("balance_coef", self.balance_coef),
            ("router_z_coef", self.router_z_coef),
            ("router_bias_rate", self.router_bias_rate),
        ] {
            let good = value.is_finite() && value >= 0.0;
            check(good, key, value.to_string(), "finite values of 0 or more");
        }
        let (width, layers) = (self.metap_base_width, self.metap_base_layers);
        for (key, value) in [("metap_base_width", width), ("metap_base_layers", layers)] {
            check(value != Some(0), key, "0".into(), "values above 0");
        }
        check(
            width.is_some() == layers.is_some(),
            "metap_base_layers",
            format!("{layers:?}"),
            "what metap_base_width needs",
        );
        check(
            width.is_none() || self.lora_rank == 0,
            "metap_base_width",
            format!("{width:?}"),
            "none, as adapters (lora_rank) need",
        );
        let alone = self.router_bias_rate == 0.0 || self.lora_rank == 0;
        check(
            alone,
            "router_bias_rate",
            self.router_bias_rate.to_string(),
            "0, which adapters (lora_rank) need",
        );
        for (i, group) in self.param_groups.iter().enumerate() {
            let rates = [("lr_scale", Some(group.lr_scale)), ("weight_decay", group.weight_decay)];
            for (key, value) in rates.into_iter().filter_map(|(key, value)| Some((key, value?))) {
                let good = value.is_finite() && value >= 0.0;
                check(
                    good,
                    &format!("param_groups[{i}].{key}"),
                    value.to_string(),
                    "finite values of 0 or more",
                );
            }
        }
        let groups = self.param_groups.iter().enumerate();
        let named = groups.map(|(i, group)| (format!("param_groups[{i}].params"), &group.params));
        let frozen = self.freeze.iter().enumerate().map(|(i, params)| (format!("freeze[{i}]"), params));
        let lora = self.lora_targets.iter().enumerate();
        let lora = lora.map(|(i, params)| (format!("lora_targets[{i}]"), params));
        for (key, params) in named.chain(frozen).chain(lora) {
            if let Err(what) = Selector::new(params) {
                problems.push(format!("{section}.{key} is \"{params}\", {what}"));
            }
        }
        problems
    }

    /// What the keys ask for and the model has not, one line each, naming the key in `section`. Empty: all is well.
    pub fn problems_with(&self, section: &str, layout: &ParamLayout) -> Vec<String> {
        let fits = |text: &str| Selector::new(text).is_ok_and(|s| layout.tensors.iter().any(|t| s.fits(t)));
        let mut problems = Vec::new();
        // A kind that the model lacks is harmless; a name that it lacks is a mistake.
        let groups = self.param_groups.iter().map(|group| ("param_groups", &group.params));
        let lists = [("freeze", &self.freeze), ("lora_targets", &self.lora_targets)];
        let listed = lists.into_iter().flat_map(|(key, list)| list.iter().map(move |text| (key, text)));
        for (key, text) in groups.chain(listed) {
            if matches!(Selector::new(text), Ok(Selector::Name(_))) && !fits(text) {
                problems.push(format!("{section}.{key}: no parameter of the model is called \"{text}\""));
            }
        }
        if self.metap().is_some_and(|base| base.growth(layout).is_none()) {
            problems.push(format!("{section}.metap_base_width: the model's head is tied to its embedding"));
        }
        if self.lora_rank > 0 && !self.lora_targets.iter().any(|text| fits(text)) {
            problems.push(format!("{section}.lora_targets fit none of the model's matrices"));
        }
        problems
    }

    /// The model that rates were found on.
    pub(super) fn metap(&self) -> Option<MetaP> {
        Some(MetaP { width: self.metap_base_width?, layers: self.metap_base_layers? })
    }

    /// How training passes are made.
    pub fn train_options(&self) -> TrainOptions {
        TrainOptions {
            recompute_layers: self.recompute_layers,
            balance_coef: self.balance_coef as f32,
            z_coef: self.router_z_coef as f32,
        }
    }

    /// Decay of the momentum, where the optimiser has some.
    pub(super) fn decay_of_momentum(&self) -> f64 {
        self.momentum.unwrap_or(if self.optimizer == OptimizerKind::Muon { 0.95 } else { 0.0 })
    }
}

/// All that an optimiser is told: its section's keys and rates.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerSettings {
    /// Rule, state, groups.
    pub config: OptimizerConfig,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Decoupled decay, on tensors of two and more dimensions only unless `decay_1d`.
    pub weight_decay: f64,
    /// Whether norms and biases decay too.
    pub decay_1d: bool,
    /// Gradients with a larger global norm are scaled down to it; `None`: never.
    pub max_grad_norm: Option<f64>,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            config: OptimizerConfig::default(),
            betas: [0.9, 0.95],
            weight_decay: 0.0,
            decay_1d: false,
            max_grad_norm: Some(1.0),
        }
    }
}
