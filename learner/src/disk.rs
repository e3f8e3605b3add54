//! The file system as the journal and the checkpoints see it: few operations, each of which may fail.
//!
//! Behind a trait so that a test can fail any of them, and can lose what was not synced.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Fills a new file.
pub type Fill<'a> = &'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>;

/// Operations on files. Nothing is durable before the matching sync: a file by [`sync_file`](Self::sync_file), a name by
/// [`sync_dir`](Self::sync_dir) of its folder.
pub trait Disk: Send + Sync {
    /// Makes a folder and its parents; fine if it is there.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes an empty file; fails with `AlreadyExists` if it is there (`O_EXCL`).
    fn create_new(&self, path: &Path) -> io::Result<()>;
    /// Replaces a file by what `fill` writes.
    fn write(&self, path: &Path, fill: Fill<'_>) -> io::Result<()>;
    /// Adds bytes to the end of a file that exists.
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Cuts a file to `len` bytes.
    fn truncate(&self, path: &Path, len: u64) -> io::Result<()>;
    /// Makes a file's content durable.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames a file (replacing) or a folder (whose new name must be free).
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a folder with everything in it.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// A file's content, to be read from its start.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read>>;
    /// A file's content, whole.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
    /// Entries of a folder, sorted by name; empty if the folder is missing.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
}

/// The file system of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemDisk;

impl Disk for SystemDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn create_new(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).open(path).map(drop)
    }

    fn write(&self, path: &Path, fill: Fill<'_>) -> io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        fill(&mut file)?;
        file.flush()
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().append(true).open(path)?.write_all(bytes)
    }

    fn truncate(&self, path: &Path, len: u64) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.set_len(len)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        Ok(Box::new(File::open(path)?))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut paths: Vec<PathBuf> =
            entries.map(|entry| entry.map(|e| e.path())).collect::<io::Result<_>>()?;
        paths.sort();
        Ok(paths)
    }
}

#[cfg(test)]
pub(crate) mod faults {
    //! A disk that crashes at the n-th operation and forgets what was not synced.

    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Mutex;

    use super::*;

    /// What happens at the chosen operation.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Fault {
        /// Power is cut: this and every later operation fails, unsynced data is lost.
        Crash,
        /// This one operation fails with EIO.
        Eio,
        /// From here on every write fails with ENOSPC; the rest works.
        Full,
    }

    #[derive(Default)]
    struct State {
        done: usize,
        crashed: bool,
        /// Files written since their last sync, with the length that is durable.
        unsynced: BTreeMap<PathBuf, u64>,
        /// Renames not yet made durable by a sync of the folder.
        renames: Vec<(PathBuf, PathBuf)>,
        /// New names not yet durable.
        names: BTreeSet<PathBuf>,
    }

    pub struct FaultyDisk {
        fault: Option<(usize, Fault)>,
        state: Mutex<State>,
    }

    impl FaultyDisk {
        pub fn new(fault: Option<(usize, Fault)>) -> Self {
            Self { fault, state: Mutex::default() }
        }

        /// Changing operations so far.
        pub fn operations(&self) -> usize {
            self.state.lock().unwrap().done
        }

        fn step(&self, writes: bool) -> io::Result<()> {
            let mut state = self.state.lock().unwrap();
            if state.crashed {
                return Err(io::Error::other("the machine is off"));
            }
            let at = state.done;
            state.done += 1;
            match self.fault {
                Some((n, Fault::Crash)) if at == n => {
                    state.crashed = true;
                    Self::lose_unsynced(&mut state);
                    Err(io::Error::other("the machine went off"))
                }
                Some((n, Fault::Eio)) if at == n => Err(io::Error::from_raw_os_error(5)),
                Some((n, Fault::Full)) if at >= n && writes => Err(io::Error::from_raw_os_error(28)),
                _ => Ok(()),
            }
        }

        /// The worst a power cut may do: unsynced renames are undone, unsynced data is cut in half.
        fn lose_unsynced(state: &mut State) {
            for (from, to) in state.renames.drain(..).rev() {
                std::fs::rename(&to, &from).ok();
            }
            for (path, durable) in std::mem::take(&mut state.unsynced) {
                if let Ok(file) = OpenOptions::new().write(true).open(&path) {
                    let len = file.metadata().map_or(durable, |m| m.len());
                    file.set_len(durable + (len.saturating_sub(durable)) / 2).ok();
                }
            }
            for path in std::mem::take(&mut state.names) {
                std::fs::remove_file(&path).ok();
            }
        }

        fn touched(&self, path: &Path, durable: u64) {
            self.state.lock().unwrap().unsynced.entry(path.to_owned()).or_insert(durable);
        }
    }

    impl Disk for FaultyDisk {
        fn create_dir(&self, path: &Path) -> io::Result<()> {
            self.step(true)?;
            SystemDisk.create_dir(path)
        }
        fn create_new(&self, path: &Path) -> io::Result<()> {
            self.step(true)?;
            SystemDisk.create_new(path)?;
            self.state.lock().unwrap().names.insert(path.to_owned());
            Ok(())
        }
        fn write(&self, path: &Path, fill: Fill<'_>) -> io::Result<()> {
            self.step(true)?;
            self.touched(path, 0);
            SystemDisk.write(path, fill)
        }
        fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            let len = std::fs::metadata(path)?.len();
            self.touched(path, len);
            if let Err(error) = self.step(true) {
                // A torn append: part of it got through.
                SystemDisk.append(path, &bytes[..bytes.len() / 3]).ok();
                return Err(error);
            }
            SystemDisk.append(path, bytes)
        }
        fn truncate(&self, path: &Path, len: u64) -> io::Result<()> {
            self.step(true)?;
            SystemDisk.truncate(path, len)
        }
        fn sync_file(&self, path: &Path) -> io::Result<()> {
            self.step(false)?;
            self.state.lock().unwrap().unsynced.remove(path);
            Ok(())
        }
        fn sync_dir(&self, path: &Path) -> io::Result<()> {
            self.step(false)?;
            let mut state = self.state.lock().unwrap();
            state.renames.retain(|(_, to)| to.parent() != Some(path));
            state.names.retain(|name| name.parent() != Some(path));
            Ok(())
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step(false)?;
            SystemDisk.rename(from, to)?;
            // Replacing a file cannot be undone here; what is undone is the appearance of a new name.
            let mut state = self.state.lock().unwrap();
            if to.is_dir() {
                state.renames.push((from.to_owned(), to.to_owned()));
            }
            Ok(())
        }
        fn remove_dir(&self, path: &Path) -> io::Result<()> {
            self.step(false)?;
            SystemDisk.remove_dir(path)
        }
        fn remove_file(&self, path: &Path) -> io::Result<()> {
            self.step(false)?;
            SystemDisk.remove_file(path)
        }
        fn open(&self, path: &Path) -> io::Result<Box<dyn Read>> {
            SystemDisk.open(path)
        }
        fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
            SystemDisk.list(path)
        }
    }
}
