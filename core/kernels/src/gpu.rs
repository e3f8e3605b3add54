//! Which NVIDIA GPUs this machine has. No kernel runs on them yet; `freewheel doctor` shows them.
//!
//! With the feature `cuda` the driver library is opened when asked, not linked: such a binary is built without a toolkit and
//! runs on machines without a driver.

/// A graphics processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its name, as the driver gives it.
    pub name: String,
    /// Its memory, bytes.
    pub memory_bytes: u64,
    /// Its compute capability: major, minor.
    pub compute_capability: (i32, i32),
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// This build has no `cuda` feature: nobody looked.
    NotBuilt,
    /// There is no driver library on this machine.
    NoDriver,
    /// The driver is there and refused, in its words.
    Refused(String),
    /// The driver answers.
    Found {
        /// The newest CUDA the driver speaks: major, minor.
        driver: (i32, i32),
        /// The devices, in the driver's order.
        gpus: Vec<Gpu>,
    },
}

/// Looks for GPUs.
#[cfg(not(feature = "cuda"))]
pub fn find() -> Gpus {
    Gpus::NotBuilt
}

/// Looks for GPUs.
#[cfg(feature = "cuda")]
pub fn find() -> Gpus {
    use cudarc::driver::{result, sys};
    // SAFETY: opening the driver library runs its initialisers; it is the system's own.
    if !unsafe { sys::is_culib_present() } {
        return Gpus::NoDriver;
    }
    let ask = || {
        result::init()?;
        let mut version = 0;
        // SAFETY: the driver writes one int through a pointer that is valid for it.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
        let gpus = (0..result::device::get_count()?).map(device).collect::<Result<Vec<Gpu>, _>>()?;
        // 1000 major + 10 minor, as documented for cuDriverGetVersion.
        Ok::<_, result::DriverError>(Gpus::Found { driver: (version / 1000, version % 1000 / 10), gpus })
    };
    ask().unwrap_or_else(|error| Gpus::Refused(error.to_string()))
}

#[cfg(feature = "cuda")]
fn device(ordinal: i32) -> Result<Gpu, cudarc::driver::result::DriverError> {
    use cudarc::driver::{result::device, sys::CUdevice_attribute as Attribute};
    let id = device::get(ordinal)?;
    // SAFETY: `id` comes from `device::get`.
    let attribute = |which| unsafe { device::get_attribute(id, which) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let memory_bytes = unsafe { device::total_mem(id) }? as u64;
    Ok(Gpu { name: device::get_name(id)?, memory_bytes, compute_capability: (major, minor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_never_fails_and_what_is_found_makes_sense() {
        let found = find();
        assert_eq!(matches!(found, Gpus::NotBuilt), !cfg!(feature = "cuda"));
        match found {
            Gpus::NotBuilt => {}
            Gpus::NoDriver | Gpus::Refused(_) => println!("skipped: no GPU answers on this machine"),
            Gpus::Found { driver, gpus } => {
                assert!(driver.0 >= 11, "{driver:?}");
                assert!(
                    gpus.iter().all(|gpu| gpu.memory_bytes > 1 << 28 && gpu.compute_capability.0 >= 3),
                    "{gpus:?}"
                );
            }
        }
    }
}
