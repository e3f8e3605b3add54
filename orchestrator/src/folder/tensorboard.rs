//! TensorBoard event files: scalars only.
//!
//! A file is a sequence of records `length u64 | masked crc32c of length u32 | bytes | masked crc32c of bytes u32`, little-endian;
//! the bytes are an `Event` message (tensorflow/core/util/event.proto): 1 wall_time double, 2 step int64, 3 file_version string,
//! 5 summary { 1 value { 1 tag string, 2 simple_value float } }.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    out: BufWriter<File>,
}

impl EventWriter {
    /// Begins a file in `dir`. A resumed run begins another; TensorBoard shows them as one.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn create(dir: &Path) -> std::io::Result<Self> {
        let now = wall_time();
        let path =
            dir.join(format!("events.out.tfevents.{:010}.freewheel.{}", now as u64, std::process::id()));
        let mut writer = Self { out: BufWriter::new(File::create(path)?) };
        let mut event = Vec::new();
        put_double(&mut event, 1, now);
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        Ok(writer)
    }

    /// Writes the scalars of one step and flushes them.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn scalars<'a>(
        &mut self,
        step: u64,
        scalars: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> std::io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut item = Vec::new();
            put_bytes(&mut item, 1, tag.as_bytes());
            put_key(&mut item, 2, 5);
            item.extend_from_slice(&(value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &item);
        }
        let mut event = Vec::new();
        put_double(&mut event, 1, wall_time());
        put_key(&mut event, 2, 0);
        put_varint(&mut event, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)?;
        self.out.flush()
    }

    fn record(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let length = (bytes.len() as u64).to_le_bytes();
        self.out.write_all(&length)?;
        self.out.write_all(&masked_crc(&length).to_le_bytes())?;
        self.out.write_all(bytes)?;
        self.out.write_all(&masked_crc(bytes).to_le_bytes())
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// CRC-32C, rotated and offset, so that a checksum of checksummed data is no trap.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_key(out, field, 1);
    out.extend_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_tensorflows() {
        // tensorflow/core/lib/hash/crc32c_test.cc: crc32c of 32 zero bytes is 0x8a9136aa.
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn records_frame_events_that_hold_the_scalars() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        writer.scalars(300, [("reward/mean", 0.5), ("train/loss", -2.0)]).unwrap();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            let event = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked_crc(event).to_le_bytes());
            events.push(event.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(events.len(), 2);
        assert!(events[0].ends_with(b"brain.Event:2"));
        // Step 300 as field 2, then the summary.
        assert_eq!(events[1][9..12], [0x10, 0xac, 0x02]);
        let value = [&b"\x0a\x12\x0a\x0breward/mean"[..], &[0x15], &0.5f32.to_le_bytes()].concat();
        assert!(events[1].windows(value.len()).any(|window| window == value), "{:?}", events[1]);
    }
}
