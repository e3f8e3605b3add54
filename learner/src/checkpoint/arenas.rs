//! Masters and moments in safetensors format, written and read without a second copy in memory.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::optim::Optimizer;

/// Names, shapes and offsets of a large model take a few MB.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Why a state could not be read.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The file ended early or could not be read.
    Io(io::Error),
    /// It is not the state of this model.
    Unsound(String),
}

#[derive(Serialize, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Every tensor of `optimizer`.
pub(super) fn write(optimizer: &Optimizer, out: &mut dyn Write) -> io::Result<()> {
    let mut header = BTreeMap::new();
    let mut at = 0;
    for tensor in optimizer.state() {
        let end = at + tensor.values.as_bytes().len() as u64;
        let dtype = tensor.values.dtype().into();
        header.insert(tensor.name, Entry { dtype, shape: tensor.shape, data_offsets: [at, end] });
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    optimizer.state().try_for_each(|tensor| out.write_all(tensor.values.as_bytes()))
}

/// Fills every tensor of `optimizer` from `file`, which holds these and no others, in any order.
pub(super) fn read(optimizer: &mut Optimizer, file: &mut dyn Read) -> Result<(), ReadError> {
    let mut header = read_header(file)?;
    let mut wanted = Vec::new();
    for tensor in optimizer.state_mut() {
        let unsound =
            |what: String| ReadError::Unsound(format!("optimiser state: tensor `{}` {what}", tensor.name));
        let entry = header.remove(&tensor.name).ok_or_else(|| unsound("is missing".into()))?;
        let [from, to] = entry.data_offsets;
        let (width, needs) = (tensor.values.width(), tensor.values.len());
        let len = to.saturating_sub(from) / width as u64;
        if entry.dtype != tensor.values.dtype() {
            return Err(unsound(format!("is {}, not {}", entry.dtype, tensor.values.dtype())));
        }
        if len != needs as u64 || entry.shape != tensor.shape {
            return Err(unsound(format!(
                "has {len} elements of shape {:?}, the model needs {needs} of {:?}",
                entry.shape, tensor.shape
            )));
        }
        wanted.push((from, tensor));
    }
    if let Some(extra) = header.keys().next() {
        return Err(ReadError::Unsound(format!("optimiser state: tensor `{extra}` is of another model")));
    }
    wanted.sort_by_key(|(from, _)| *from);
    let mut at = 0;
    for (from, mut tensor) in wanted {
        if from != at {
            let what =
                format!("optimiser state: tensor `{}` starts at byte {from}, expected {at}", tensor.name);
            return Err(ReadError::Unsound(what));
        }
        let width = tensor.values.width();
        let bytes = tensor.values.as_bytes_mut();
        at += bytes.len() as u64;
        file.read_exact(bytes).map_err(ReadError::Io)?;
        if cfg!(target_endian = "big") {
            bytes.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
    }
    Ok(())
}

fn read_header(file: &mut dyn Read) -> Result<BTreeMap<String, Entry>, ReadError> {
    let mut len = [0; 8];
    file.read_exact(&mut len).map_err(ReadError::Io)?;
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER_BYTES {
        return Err(ReadError::Unsound(format!(
            "a header of {len} bytes, at most {MAX_HEADER_BYTES} are read"
        )));
    }
    let mut header = vec![0; len as usize];
    file.read_exact(&mut header).map_err(ReadError::Io)?;
    serde_json::from_slice(&header).map_err(|error| ReadError::Unsound(format!("header: {error}")))
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::Threads;
    use freewheel_model::{ParamData, Params};

    use super::*;
    use crate::optim::OptimizerSettings;
    use crate::testing::layout_of;

    fn optimizer(shapes: &[&[usize]]) -> Optimizer {
        let layout = layout_of(shapes);
        let data = ParamData::F32((0..layout.total).map(|i| i as f32 / 8.0).collect());
        Optimizer::new(OptimizerSettings::default(), &Params { layout, data })
    }

    fn stepped() -> (Optimizer, Vec<u8>) {
        let mut trained = optimizer(&[&[2, 2], &[5]]);
        trained.step(&Threads::single(), &mut [0.3, -0.2, 0.1, 0.0, 1.0, 2.0, -3.0, 0.5, 0.25], 1e-2);
        let mut bytes = Vec::new();
        write(&trained, &mut bytes).expect("a Vec takes everything");
        (trained, bytes)
    }

    fn refused(bytes: &[u8], shapes: &[&[usize]]) -> String {
        match read(&mut optimizer(shapes), &mut &bytes[..]) {
            Err(ReadError::Unsound(what)) => what,
            Err(ReadError::Io(error)) => error.to_string(),
            Ok(()) => panic!("it was read"),
        }
    }

    #[test]
    fn the_state_comes_back_to_the_bit() {
        let (trained, bytes) = stepped();
        let mut restored = optimizer(&[&[2, 2], &[5]]);
        read(&mut restored, &mut &bytes[..]).expect("what was written");
        restored.set_steps(trained.steps());
        assert_eq!(restored, trained);
    }

    #[test]
    fn another_models_state_is_refused_by_the_name_of_the_tensor() {
        let (_, bytes) = stepped();
        let more = refused(&bytes, &[&[2, 2], &[5], &[1]]);
        assert!(more.contains("`master.t2` is missing"), "{more}");
        let fewer = refused(&bytes, &[&[2, 2]]);
        assert!(fewer.contains(".t1` is of another model"), "{fewer}");
        let other = refused(&bytes, &[&[4], &[5]]);
        assert!(other.contains("`master.t0` has 4 elements of shape [2, 2]"), "{other}");
    }

    #[test]
    fn a_damaged_file_is_refused() {
        let (_, mut bytes) = stepped();
        let cut = refused(&bytes[..bytes.len() - 1], &[&[2, 2], &[5]]);
        assert!(cut.contains("fill whole buffer"), "{cut}");
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let huge = refused(&bytes, &[&[2, 2], &[5]]);
        assert!(huge.contains("at most"), "{huge}");
    }
}
