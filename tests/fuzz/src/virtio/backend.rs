// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices, and what is behind them in the host.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use twostage::sync::Mutex;

use rustix::fs::{memfd_create, MemfdFlags};
use twostage_vmm::inside::virtio::{
    Backend, Block, Disk, DiskAccess, Faults, Features, FrameLink, MacAddress, Net, Rng, Tap,
};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// Sectors of the disk.
pub const SECTORS: u64 = 32;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// What kind of device it is, and the test's end of it.
pub enum Kind {
    /// A disk in this file, of which some operations may fail.
    Blk { file: File, faults: Faults, read_only: bool },
    /// A network with this wire.
    Net(Arc<Wire>),
    /// Entropy, which is zeroes.
    Rng,
}

/// Errors of an interface that is gone: ENODEV, ENOLINK, EBADFD.
const GONE: [i32; 3] = [19, 67, 77];
/// Other errors: EINTR, EAGAIN, EIO, ENOBUFS.
const ERRORS: [i32; 4] = [4, 11, 5, 105];

/// Frames on their way, without the host's network.
#[derive(Debug, Default)]
pub struct Wire {
    /// The address of the device.
    pub mac: [u8; 6],
    /// To the device; or the host's error when it looks for one.
    pub incoming: Mutex<VecDeque<Result<Vec<u8>, i32>>>,
    /// From the device, lost or not.
    pub sent: Mutex<VecDeque<Vec<u8>>>,
    /// The host's errors when the device next sends something, or sets something.
    pub errors: Mutex<VecDeque<i32>>,
}

impl Wire {
    /// The host will have an error, of those that `number` says, when a frame is looked for after
    /// those that are there; or when something is sent or set.
    pub fn will_fail(&self, receiving: bool, number: u8) {
        let error = *ERRORS.iter().chain(&GONE).cycle().nth(number.into()).expect("there are some");
        match receiving {
            true => self.incoming.lock().push_back(Err(error)),
            false => self.errors.lock().push_back(error),
        }
    }

    /// The host does what it should from now on.
    pub fn mend(&self) {
        self.incoming.lock().retain(Result::is_ok);
        self.errors.lock().clear();
    }

    /// The host's next error, if it is one of `which`.
    fn fail(&self, which: impl FnOnce(i32) -> bool) -> io::Result<()> {
        let mut errors = self.errors.lock();
        match errors.front() {
            Some(&error) if which(error) => {
                errors.pop_front();
                Err(io::Error::from_raw_os_error(error))
            }
            _ => Ok(()),
        }
    }
}

/// The device's end of a wire.
struct End(Arc<Wire>, EventFd);

impl AsRawFd for End {
    fn as_raw_fd(&self) -> RawFd {
        self.1.as_raw_fd()
    }
}

impl FrameLink for End {
    fn name(&self) -> &str {
        "fuzz"
    }

    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let frame = self.0.incoming.lock().pop_front();
        let frame = frame.ok_or(io::ErrorKind::WouldBlock)?;
        let frame = frame.map_err(io::Error::from_raw_os_error)?;
        data[..frame.len()].copy_from_slice(&frame);
        Ok(frame.len())
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.sent.lock().push_back(frame.to_vec());
        self.0.fail(|_| true)
    }

    fn set_offloads(&mut self, _: Features) -> io::Result<()> {
        // With other errors no device starts.
        self.0.fail(|error| GONE.contains(&error))
    }
}

/// A file in memory with `length` zeroes. Its path in /proc is valid while it exists.
fn memory_file(length: u64) -> (File, String) {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.set_len(length).expect("memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path)
}

/// Opens images that are none, and interfaces that are not there.
pub fn refused(input: &mut Input<'_>) {
    let magics: [&[u8]; 5] = [b"QFI\xfb", b"KDMV", b"conectix", b"", b"vhdxfile"];
    let (file, path) = memory_file(input.pick(&[0, 511, 512, 513, 16384]));
    let (magic, choice) = (input.pick(&magics), input.byte());
    std::os::unix::fs::FileExt::write_all_at(&file, magic, 0).expect("memory");
    let access =
        DiskAccess { read_only: choice & 1 != 0, direct: choice & 2 != 0, raw: choice & 4 != 0 };
    let path = if choice & 8 != 0 { path } else { input.pick(&["/", "/dev/zero", "/x"]).into() };
    match Disk::open(path.as_ref(), access) {
        Ok(disk) => {
            assert_eq!(disk.size() % u64::from(disk.block_size()), 0);
            let again = Disk::open(path.as_ref(), access);
            assert_eq!(again.is_ok(), access.read_only, "one writer, or several readers");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let name = String::from_utf8_lossy(&input.bytes(20)).into_owned();
    let tap = if choice & 16 != 0 { Tap::open(&name) } else { Tap::from_fd(file.as_raw_fd()) };
    assert!(!tap.expect_err("there is no such interface").to_string().is_empty());
    assert!(name.parse::<MacAddress>().is_err() || name.len() == 17);
}

/// A device with threads of its own: a disk in memory that is waited for.
pub fn threaded(input: &mut Input<'_>) -> (Kind, Box<dyn Backend>) {
    let (file, path) = memory_file(SECTORS * SECTOR);
    let disk = Disk::open(path.as_ref(), DiskAccess::default()).expect("a disk");
    let block = Block::waiting(disk, input.below(3) + 1, input.flag()).expect("descriptors");
    (Kind::Blk { file, faults: Faults::default(), read_only: false }, Box::new(block))
}

/// The device that `input` says.
pub fn device(input: &mut Input<'_>) -> (Kind, Box<dyn Backend>) {
    match input.byte() % 8 {
        kind @ 0..=3 => {
            let header = input.byte();
            let (read_only, queues) = (header & 7 == 7, usize::from(header >> 6) + 1);
            let (file, path) = memory_file(SECTORS * SECTOR);
            let access = DiskAccess { read_only, direct: false, raw: header & 8 != 0 };
            let disk = Disk::open(path.as_ref(), access).expect("a disk");
            let faults = Faults::default();
            let block = match kind {
                0 | 1 => Block::scripted(disk, queues, faults.clone()),
                // In memory, with no disk to wait for.
                _ => Block::new(disk, queues),
            };
            (Kind::Blk { file, faults, read_only }, Box::new(block.expect("descriptors")))
        }
        4..=6 => {
            let number = input.byte();
            // A locally administered one.
            let mac = [2, 0x74, 0x73, 0, 0, number];
            let wire = Arc::new(Wire { mac, ..Wire::default() });
            let end = End(wire.clone(), EventFd::new(0).expect("descriptors"));
            (Kind::Net(wire), Box::new(Net::new(end, MacAddress::local(number))))
        }
        _ => (Kind::Rng, Box::new(Rng::open("/dev/zero".as_ref()).expect("zeroes"))),
    }
}
