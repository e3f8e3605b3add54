//! Encoded images to RGB: transparency is dropped, grey and palettes become colours, 16 bits become 8.

use std::io::Cursor;

use super::Rgb8;

/// Most pixels of an image that is decoded: a small file may claim a huge one.
const MAX_PIXELS: usize = 1 << 26;

/// Height and width of a PNG file, by its head.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn size(bytes: &[u8]) -> Result<(usize, usize), String> {
    let reader = open(bytes)?;
    Ok((reader.info().height as usize, reader.info().width as usize))
}

/// Decodes a PNG file's bytes.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn decode(bytes: &[u8]) -> Result<Rgb8, String> {
    let mut reader = open(bytes)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let size = reader.output_buffer_size().ok_or("its pixels do not fit memory")?;
    let mut raw = vec![0; size];
    let frame = reader.next_frame(&mut raw).map_err(|error| format!("not a readable PNG: {error}"))?;
    raw.truncate(frame.buffer_size());
    let data = match frame.color_type {
        png::ColorType::Rgb => raw,
        png::ColorType::Rgba => raw.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
        png::ColorType::Grayscale => raw.iter().flat_map(|p| [*p; 3]).collect(),
        png::ColorType::GrayscaleAlpha => raw.chunks_exact(2).flat_map(|p| [p[0]; 3]).collect(),
        png::ColorType::Indexed => return Err("a palette that was not expanded".into()),
    };
    assert_eq!(data.len(), width * height * 3, "every pixel decoded");
    Ok(Rgb8 { height, width, data })
}

fn open(bytes: &[u8]) -> Result<png::Reader<Cursor<&[u8]>>, String> {
    if !bytes.starts_with(b"\x89PNG") {
        return Err("not a PNG file; convert the image to PNG".into());
    }
    let limits = png::Limits { bytes: 16 * MAX_PIXELS };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let reader = decoder.read_info().map_err(|error| format!("not a readable PNG: {error}"))?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    match width.saturating_mul(height) {
        0..=MAX_PIXELS => Ok(reader),
        _ => Err(format!("{width} x {height} pixels, more than the limit of {MAX_PIXELS}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(width: u32, height: u32, color: png::ColorType, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, width, height);
        encoder.set_color(color);
        encoder.set_depth(png::BitDepth::Eight);
        if color == png::ColorType::Indexed {
            encoder.set_palette(vec![0, 0, 0, 9, 8, 7]);
        }
        encoder.write_header().unwrap().write_image_data(data).unwrap();
        out
    }

    #[test]
    fn every_colour_type_becomes_rgb() {
        for (color, data, expected) in [
            (png::ColorType::Rgb, vec![1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
            (png::ColorType::Rgba, vec![1, 2, 3, 0, 4, 5, 6, 255], [1, 2, 3, 4, 5, 6]),
            (png::ColorType::Grayscale, vec![7, 9], [7, 7, 7, 9, 9, 9]),
            (png::ColorType::GrayscaleAlpha, vec![7, 0, 9, 255], [7, 7, 7, 9, 9, 9]),
            (png::ColorType::Indexed, vec![1, 0], [9, 8, 7, 0, 0, 0]),
        ] {
            let image = decode(&encode(2, 1, color, &data)).unwrap();
            assert_eq!(image, Rgb8 { height: 1, width: 2, data: expected.to_vec() }, "{color:?}");
        }
    }

    #[test]
    fn broken_files_are_errors() {
        let good = encode(2, 1, png::ColorType::Rgb, &[1, 2, 3, 4, 5, 6]);
        for cut in 0..good.len() - 12 {
            assert!(decode(&good[..cut]).is_err(), "cut at {cut}");
        }
        // A header that claims 2^31 - 1 rows of as many pixels.
        let mut huge = good;
        huge[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
        assert!(decode(&huge).is_err());
        assert!(decode(b"GIF89a").unwrap_err().contains("convert the image to PNG"));
    }
}
