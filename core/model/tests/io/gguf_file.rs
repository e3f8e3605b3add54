//! A writer of GGUF files, after the format's specification.

/// A metadata value.
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
}

/// A file in the making.
#[derive(Default)]
pub struct GgufFile {
    pub meta: Vec<(String, Meta)>,
    /// Name, shape with the slowest dimension first, GGML type number, data.
    pub tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

impl GgufFile {
    pub fn set(&mut self, key: &str, value: Meta) {
        self.meta.retain(|(name, _)| name != key);
        self.meta.push((key.to_owned(), value));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            text(&mut out, key);
            match value {
                Meta::U32(n) => out.extend([&4u32.to_le_bytes()[..], &n.to_le_bytes()].concat()),
                Meta::F32(x) => out.extend([&6u32.to_le_bytes()[..], &x.to_le_bytes()].concat()),
                Meta::Bool(flag) => out.extend([&7u32.to_le_bytes()[..], &[u8::from(*flag)]].concat()),
                Meta::Text(value) => {
                    out.extend(8u32.to_le_bytes());
                    text(&mut out, value);
                }
                Meta::Texts(items) => {
                    list(&mut out, 8, items.len());
                    items.iter().for_each(|item| text(&mut out, item));
                }
                Meta::Floats(items) => {
                    list(&mut out, 6, items.len());
                    items.iter().for_each(|item| out.extend(item.to_le_bytes()));
                }
                Meta::Bools(items) => {
                    list(&mut out, 7, items.len());
                    items.iter().for_each(|item| out.push(u8::from(*item)));
                }
                Meta::Ints(items) => {
                    list(&mut out, 5, items.len());
                    items.iter().for_each(|item| out.extend(item.to_le_bytes()));
                }
            }
        }
        let mut offset = 0u64;
        for (name, shape, kind, data) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += data.len().next_multiple_of(32) as u64;
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for (.., data) in &self.tensors {
            out.extend_from_slice(data);
            out.resize(out.len() + data.len().next_multiple_of(32) - data.len(), 0);
        }
        out
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn list(out: &mut Vec<u8>, kind: u32, n: usize) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((n as u64).to_le_bytes());
}
