//! A set of ids that are handed out in ascending order: everything below a mark, and a bitmap above it.

use roaring::RoaringTreemap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Every id below `low_water`, and those in `above`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IdSet {
    low_water: u64,
    above: RoaringTreemap,
}

/// As it is written: the bitmap in roaring's portable format, hex.
#[derive(Serialize, Deserialize)]
struct Written {
    low_water: u64,
    above: String,
}

impl IdSet {
    /// Whether `id` is in it.
    pub fn contains(&self, id: u64) -> bool {
        id < self.low_water || self.above.contains(id)
    }

    /// Adds `id`; `false` if it was there.
    pub fn insert(&mut self, id: u64) -> bool {
        let new = id >= self.low_water && self.above.insert(id);
        while self.above.contains(self.low_water) {
            self.above.remove(self.low_water);
            self.low_water += 1;
        }
        new
    }

    /// Takes `id` out.
    pub fn remove(&mut self, id: u64) {
        if id < self.low_water {
            self.above.insert_range(id..self.low_water);
            self.low_water = id;
        }
        self.above.remove(id);
    }

    /// Every id below this is in it.
    pub fn low_water(&self) -> u64 {
        self.low_water
    }

    /// Number of ids.
    pub fn len(&self) -> u64 {
        self.low_water + self.above.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The largest id.
    pub fn max(&self) -> Option<u64> {
        self.above.max().or(self.low_water.checked_sub(1))
    }
}

impl Serialize for IdSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(self.above.serialized_size());
        self.above.serialize_into(&mut bytes).map_err(serde::ser::Error::custom)?;
        let above = bytes.iter().map(|b| format!("{b:02x}")).collect();
        Written { low_water: self.low_water, above }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for IdSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let written = Written::deserialize(deserializer)?;
        let text = written.above.as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> =
            text.chunks(2).map(|pair| if pair.len() == 2 { byte(pair) } else { None }).collect();
        let bytes = bytes.ok_or_else(|| D::Error::custom("the id bitmap is not hex"))?;
        let above = RoaringTreemap::deserialize_from(&bytes[..]).map_err(D::Error::custom)?;
        Ok(Self { low_water: written.low_water, above })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_does(operations in prop::collection::vec((any::<bool>(), 0u64..40), 0..200)) {
            let (mut ids, mut model) = (IdSet::default(), BTreeSet::new());
            for (insert, id) in operations {
                if insert {
                    prop_assert_eq!(ids.insert(id), model.insert(id));
                } else {
                    ids.remove(id);
                    model.remove(&id);
                }
                prop_assert_eq!(ids.len(), model.len() as u64);
                prop_assert_eq!(ids.max(), model.last().copied());
            }
            (0..41).try_for_each(|id| { prop_assert_eq!(ids.contains(id), model.contains(&id)); Ok(()) })?;
            let text = serde_json::to_string(&ids).unwrap();
            prop_assert_eq!(serde_json::from_str::<IdSet>(&text).unwrap(), ids);
        }
    }
}
