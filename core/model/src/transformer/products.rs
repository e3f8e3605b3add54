//! The products with weights that one forward pass makes: what speed is measured over.

use freewheel_kernels::{Precision, Quantisation};
use freewheel_types::WeightsDtype;

use super::Transformer;
use super::bindings::{FfnBinding, Linear, MlpBinding};

/// Equal products `x [m,k]` · `W [n,k]`ᵀ of a forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct ProductShape {
    /// What they compute: `qkv`, `out`, `gate_up`, `down`, `router`, `expert_gate_up`, `expert_down`, `unpack`, `head`.
    pub what: &'static str,
    /// Output width.
    pub n: usize,
    /// Input width.
    pub k: usize,
    /// Matrices of this shape in the model.
    pub count: usize,
    /// Experts a token is sent to, of how many, where these are routed experts.
    pub routed: Option<(usize, usize)>,
    /// Numbers that the product is computed in.
    pub precision: Precision,
    /// Codes that W is stored in, if it is quantised.
    pub quantisation: Option<Quantisation>,
}

impl ProductShape {
    /// Share of all tokens that one of the matrices sees, where experts are chosen evenly.
    pub fn token_share(&self) -> f64 {
        self.routed.map_or(1.0, |(chosen, of)| chosen as f64 / of as f64)
    }

    /// Bytes of one of the matrices, as a product reads them.
    pub fn bytes(&self) -> f64 {
        let weight = match (self.quantisation, self.precision) {
            (Some(quantisation), _) => quantisation.weight_bytes(),
            (None, Precision::Bf16) => 2.0,
            (None, Precision::F32) => 4.0,
        };
        (self.n * self.k) as f64 * weight
    }
}

impl Transformer {
    /// All products with weights of a token's forward pass, where parameters are `dtype`; image encoders left out.
    pub fn products(&self, dtype: WeightsDtype) -> Vec<ProductShape> {
        let precision = match dtype {
            WeightsDtype::Bf16 => Precision::Bf16,
            WeightsDtype::F32 => Precision::F32,
        };
        let quantisation = self.quantisation.map(|quantised| quantised.layers);
        let mut list = List { precision, quantisation, products: Vec::new() };
        for layer in &self.bindings.layers {
            list.add("qkv", &layer.qkv, None);
            for unpack in layer.latent.iter().flat_map(|latent| latent.q.iter().chain([&latent.kv])) {
                list.add("unpack", &unpack.up, None);
            }
            list.add("out", &layer.out, None);
            match &layer.ffn {
                FfnBinding::Dense(mlp) => list.mlp(["gate_up", "down"], mlp, None),
                FfnBinding::Moe(moe) => {
                    list.add_in("router", &moe.router, None, (Precision::F32, None));
                    let routed = Some((self.spec.top_k(), moe.experts.len()));
                    for expert in &moe.experts {
                        list.mlp(["expert_gate_up", "expert_down"], expert, routed);
                    }
                    if let Some(shared) = &moe.shared {
                        list.mlp(["gate_up", "down"], shared, None);
                    }
                }
            }
        }
        let head = self.quantisation.map(|quantised| quantised.head);
        list.add_in("head", &self.bindings.head, None, (list.precision, head));
        list.products
    }
}

struct List {
    precision: Precision,
    quantisation: Option<Quantisation>,
    products: Vec<ProductShape>,
}

impl List {
    fn mlp(&mut self, [gate_up, down]: [&'static str; 2], at: &MlpBinding, routed: Option<(usize, usize)>) {
        self.add(gate_up, &at.gate_up, routed);
        self.add(down, &at.down, routed);
    }

    fn add(&mut self, what: &'static str, at: &Linear, routed: Option<(usize, usize)>) {
        self.add_in(what, at, routed, (self.precision, self.quantisation));
    }

    fn add_in(
        &mut self,
        what: &'static str,
        at: &Linear,
        routed: Option<(usize, usize)>,
        (precision, quantisation): (Precision, Option<Quantisation>),
    ) {
        let new = ProductShape { what, n: at.n, k: at.k, count: 1, routed, precision, quantisation };
        let same = |known: &ProductShape| ProductShape { count: 1, ..known.clone() } == new;
        match self.products.iter_mut().find(|known| same(known)) {
            Some(known) => known.count += 1,
            None => self.products.push(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::{CodeBits, Threads};
    use freewheel_types::PolicyVersion;

    use crate::{PolicyWeights, Purpose};

    #[test]
    fn products_read_what_packed_weights_hold() {
        let assets = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/sprout");
        let loaded = crate::load(&assets, None).unwrap();
        let dtype = loaded.params.dtype();
        for model in [loaded.model.clone(), loaded.model.quantised(CodeBits::Four, 32)] {
            let version = PolicyVersion::default();
            let threads = Threads::single();
            let packed = PolicyWeights::pack(&model, &loaded.params, version, Purpose::Sampling, &threads);
            let sum: f64 = model.products(dtype).iter().map(|p| p.count as f64 * p.bytes()).sum();
            // Panels are padded to sixteen columns and codes to whole lines.
            let (held, room) = (packed.forward_bytes() as f64, 0.05 * sum);
            assert!(sum <= held && held <= sum + room, "{sum} of {held}");
        }
        let products = loaded.model.products(dtype);
        let experts = products.iter().find(|p| p.what == "expert_down").unwrap();
        let spec = loaded.model.spec();
        assert_eq!(experts.count, spec.moe_layers() * spec.experts());
        assert_eq!(experts.routed, Some((spec.top_k(), spec.experts())));
    }
}
