// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entropy device (virtio 1.3 §5.4).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::backend::{Backend, Features, Model};
use super::chain::{Broken, NotCopied, Unserved};
use super::memory::DeviceMemory;
use super::queue::{Interrupts, Virtqueue};
use crate::process::named_file;

/// Bytes for one request at most; drivers accept less than they ask for.
const MAX_REQUEST: usize = 4096;

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    source: File,
    path: PathBuf,
}

impl Rng {
    /// A device that returns bytes from `source`.
    ///
    /// # Errors
    /// The source cannot be opened, or is neither a file nor a character device: reading a FIFO may
    /// block for ever, and a directory has no bytes.
    pub fn open(source: &Path) -> io::Result<Self> {
        let path = source.to_owned();
        let source = named_file::open(source, File::options().read(true), 0)?;
        let kind = source.metadata()?.file_type();
        if !kind.is_file() && !kind.is_char_device() {
            return Err(io::Error::other("neither a file nor a character device"));
        }
        Ok(Self { source, path })
    }

    /// Reads some bytes, as long as that takes.
    fn read(&mut self, data: &mut [u8]) -> Result<usize, Broken> {
        loop {
            match self.source.read(data) {
                // A signal came, or the process was stopped and goes on.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => {
                    let path = self.path.display();
                    let broken = |error| Broken::Device(format!("its source {path}: {error}"));
                    return read.map_err(broken);
                }
            }
        }
    }
}

impl Backend for Rng {
    fn model(&self) -> Model {
        Model {
            name: "rng",
            device_type: VIRTIO_ID_RNG as u16,
            class: 0x00_ff00,
            features: Features::default(),
            queue_sizes: &[64],
            config: Vec::new(),
        }
    }

    fn host(&self) -> String {
        self.path.display().to_string()
    }

    fn start(&mut self, _features: Features) -> Result<(), Broken> {
        Ok(())
    }

    fn serve(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        let Some(queue) = queues.get_mut(number) else { return Ok(false) };
        let counters = queue.counters();
        let mut buffer = [0; MAX_REQUEST];
        // Its source may take long.
        queue.drain(memory, Interrupts::Each, |memory, chain| {
            let length = chain.writable().min(MAX_REQUEST as u64) as usize;
            // At most the length of the buffer.
            let data = &mut buffer[..length];
            let count = self.read(data)?;
            // A failed request cannot be reported: it returns no bytes.
            match chain.write(memory, 0, &data[..count]) {
                Ok(()) => Ok(count as u32),
                Err(NotCopied::NotNow(not_now)) => Err(not_now.into()),
                Err(NotCopied::Unreachable) => {
                    counters.unreachable.count();
                    Ok(0)
                }
            }
        })
    }
}
