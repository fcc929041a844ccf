// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a hostile process of the same user can send to the owner of emulated files that it has
//! descriptors of: messages of the preload library's protocol, calls with any arguments among them,
//! and answers to what the owner asks.
//!
//! Each message is answered once or refused, in time. A process beside it, which has nothing to do
//! with it, keeps its objects and mappings. At the end no file is open, no descriptor is left, and
//! no memory is pinned.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use arbitrary::Unstructured;
use rustix::fs::{memfd_create, MemfdFlags};
use twostage_emulated::uapi::vfio_request as vfio;
use twostage_preload_server::server;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::input::Input;
use crate::ioctls::table::{iommufd, CONTAINER_IOCTLS, DEVICE_IOCTLS, IOCTLS};
use crate::ioctls::value;

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 32;
/// How long the owner may take to notice that all is closed.
const PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors that a client has at most.
const MAX_FILES: usize = 6;
/// Files that it may open. The other device is its neighbour's.
const PATHS: [&str; 4] = ["/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/vfio", "/dev/vfio/0"];
/// Bytes of its memory, and of a page.
const MEMORY: usize = (value::PAGES * value::PAGE) as usize;
const PAGE: usize = value::PAGE as usize;

const MAGIC: &[u8; 8] = b"twostage";
const IOCTL: u64 = 1;
const READ: u64 = 2;
const PINNED: u64 = 6;
const DONE: u64 = 7;
const FAILED: u64 = 8;
const INSTALL: u64 = 9;

/// Memory of this process that the owner may access. Whatever length a client says, other memory
/// beside it, such as a heap, is out of its reach: the memory is a private mapping of a file, whose
/// last page is past the file's end.
struct Memory(MmapRegion);

impl Memory {
    /// That of the process, which stays where it is.
    fn get() -> &'static Self {
        static MEMORY_OF_ALL: OnceLock<Memory> = OnceLock::new();
        // The neighbour's is behind that of clients.
        MEMORY_OF_ALL.get_or_init(|| {
            let length = 3 * MEMORY;
            let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("memory"));
            file.set_len((length + PAGE) as u64).expect("memory");
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let backing = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
            let region =
                MmapRegion::build(Some(backing), length + PAGE, protection, libc::MAP_PRIVATE);
            file.set_len(length as u64).expect("memory");
            Self(region.expect("memory"))
        })
    }

    /// The address of byte `at` of what clients use; the neighbour's is behind it.
    fn address(&self, at: usize) -> u64 {
        self.0.as_ptr() as u64 + at as u64
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        self.0.as_volatile_slice().write_slice(bytes, at).expect("it fits");
    }

    fn word(&self, at: usize) -> u32 {
        self.0.as_volatile_slice().read_obj(at).expect("it is there")
    }
}

/// A message: its type and three numbers.
fn message(words: [u64; 4]) -> Vec<u8> {
    let words = words.iter().flat_map(|word| word.to_ne_bytes());
    MAGIC.iter().copied().chain(words).collect()
}

/// The answer to a descriptor: it has this number.
fn reply(number: u64) -> Vec<u8> {
    message([DONE, number, 0, 0])
}

/// The number of a message's type, and the next number, if it is a message.
fn parts(message: &[u8]) -> (u64, u64) {
    assert_eq!((message.len(), &message[..8]), (40, &MAGIC[..]), "what the owner sends");
    let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("8 bytes"));
    (word(8), word(16))
}

/// Sends a request to `file` and returns the answer: a value or an errno. What comes before it is
/// taken with the number `number`, and kept in `taken`.
fn ask(
    file: &OwnedFd,
    request: &[u8],
    number: u64,
    taken: &mut Vec<OwnedFd>,
) -> Option<Result<u64, u64>> {
    let (channel, theirs) = server::channel().expect("descriptors");
    server::send(file.as_fd(), request, Some(theirs.as_fd())).ok()?;
    drop(theirs);
    loop {
        let (message, passed) = server::receive(channel.as_fd())?;
        match parts(&message) {
            (DONE, value) => return Some(Ok(value)),
            (FAILED, errno) => return Some(Err(errno)),
            (INSTALL, _) => {
                taken.push(passed.expect("a descriptor comes with it"));
                // As they like: the right number, or any.
                let number = if number == 0 { taken.last().map_or(0, raw) } else { number };
                let _ = server::send(channel.as_fd(), &reply(number), None);
            }
            (other, _) => panic!("a message of type {other}"),
        }
    }
}

fn raw(fd: &OwnedFd) -> u64 {
    fd.as_raw_fd() as u64
}

/// The process beside the hostile ones, from the first to the last. From the start to the end of
/// each of them, it has an IOAS in which it has a page mapped.
struct Neighbour {
    file: OwnedFd,
}

impl Neighbour {
    /// Where its own memory is: out of reach of what the other one maps.
    const AT: usize = 2 * MEMORY;
    const IOVA: u64 = 0x10_0000;

    fn new() -> Self {
        let neighbour = Self { file: server::open("/dev/iommu").expect("it is there") };
        // What stays from the first mapping on is there.
        let ioas = neighbour.start();
        neighbour.end(ioas);
        neighbour
    }

    /// That of the process.
    fn get() -> &'static Self {
        static NEIGHBOUR: OnceLock<Neighbour> = OnceLock::new();
        NEIGHBOUR.get_or_init(Self::new)
    }

    /// Returns its IOAS.
    fn start(&self) -> u32 {
        self.ioctl(0x81, &[12, 0, 0]).expect("an IOAS");
        let ioas = Memory::get().word(Self::AT + 8);
        let page = Memory::get().address(Self::AT + PAGE);
        let words = [page, PAGE as u64, Self::IOVA];
        let words = words.iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]);
        // Fixed, readable and writable.
        let map: Vec<_> = [40, 7, ioas, 0].into_iter().chain(words).collect();
        self.ioctl(0x85, &map).expect("a mapping");
        ioas
    }

    fn ioctl(&self, number: u32, words: &[u32]) -> Result<u64, u64> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Memory::get().write(Self::AT, &bytes);
        let address = Memory::get().address(Self::AT);
        let request = message([IOCTL, iommufd(number).into(), address, 0]);
        ask(&self.file, &request, 0, &mut Vec::new()).expect("an answer")
    }

    /// Its mapping is there, and nothing else in its `ioas`, which nobody else uses.
    fn end(&self, ioas: u32) {
        let unmap = [24, ioas, 0, 0, u32::MAX, u32::MAX];
        assert_eq!(self.ioctl(0x86, &unmap), Ok(0), "the neighbour's mappings");
        assert_eq!(Memory::get().word(Self::AT + 16), PAGE as u32, "the neighbour's mapping");
        assert_eq!(self.ioctl(0x80, &[8, ioas]), Ok(0), "the neighbour's IOAS");
    }
}

/// How many descriptors this process has.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

/// One execution.
pub fn run(bytes: &[u8]) {
    // What stays is there from the first time on: the neighbour's file, too.
    let neighbour = Neighbour::get();
    assert_eq!(server::files(), 1);
    let before = descriptors();
    let ioas = neighbour.start();
    let mut client = Client { files: Vec::new(), end: None };
    let mut input = Input::new(bytes);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        client.step(&mut input);
    }
    neighbour.end(ioas);
    drop(client);
    // The owner may have messages to read yet, which can hold descriptors of files.
    let deadline = Instant::now() + PATIENCE;
    while server::files() > 1 {
        assert!(Instant::now() < deadline, "files are left");
        std::thread::yield_now();
    }
    let memory = Memory::get().address(0);
    assert!(!server::is_pinned(memory, 3 * MEMORY as u64), "memory is pinned");
    assert_eq!(descriptors(), before, "descriptors are left");
}

/// The hostile process.
struct Client {
    files: Vec<OwnedFd>,
    /// An end of a channel that nobody reads.
    end: Option<OwnedFd>,
}

impl Client {
    fn step(&mut self, input: &mut Input<'_>) {
        let which = input.below(MAX_FILES);
        if self.files.len() <= which {
            if self.files.len() < MAX_FILES {
                self.files.extend(server::open(input.pick(&PATHS)).ok());
            }
            return;
        }
        // What the owner gives it, it calls by that number, or another.
        let number = if input.one_in(8) { input.number() | 1 } else { 0 };
        let mut taken = Vec::new();
        let request = match input.byte() % 16 {
            kind @ 0..=9 => {
                let (request, bytes) = self.ioctl(kind, input);
                Memory::get().write(0, &bytes);
                message([IOCTL, request.into(), Memory::get().address(0), 0])
            }
            10 => message([IOCTL, vfio(input.byte().into()).into(), input.byte().into(), 0]),
            11 | 12 => {
                // read, pread, write and pwrite.
                let kind = READ + u64::from(input.byte() % 4);
                message([kind, place(input), input.byte().into(), input.number()])
            }
            13 => message([PINNED, input.number(), input.number(), 0]),
            14 => {
                drop(self.files.remove(which));
                return;
            }
            _ => return self.nonsense(which, input),
        };
        let answer = ask(&self.files[which], &request, number, &mut taken);
        assert!(answer.is_some(), "a request was not answered");
        self.files.extend(taken.into_iter().take(MAX_FILES.saturating_sub(self.files.len())));
    }

    /// An ioctl and its structure, with pointers to this process's memory.
    fn ioctl(&self, kind: u8, input: &mut Input<'_>) -> (u32, Vec<u8>) {
        let table = match kind {
            0..=5 => IOCTLS,
            6 | 7 => DEVICE_IOCTLS,
            _ => CONTAINER_IOCTLS,
        };
        let ioctl = &table[input.below(table.len())];
        let bytes = input.bytes(40);
        let mut bytes = ioctl.argument(&mut Unstructured::new(&bytes)).unwrap_or(vec![4, 0, 0, 0]);
        // Descriptors are small there; some of those that this one has.
        for (at, file) in (8..).step_by(4).zip(self.files.iter().take(1)) {
            if input.one_in(4) && bytes.len() >= at + 4 {
                bytes[at..at + 4].copy_from_slice(&(raw(file) as u32).to_le_bytes());
            }
        }
        for word in bytes.chunks_exact_mut(8) {
            let number = u64::from_le_bytes((&*word).try_into().expect("8 bytes"));
            word.copy_from_slice(&tame(number).to_le_bytes());
        }
        (ioctl.request, bytes)
    }

    /// What is no request: a wrong length, start or type, or nothing to answer on.
    fn nonsense(&mut self, which: usize, input: &mut Input<'_>) {
        let file = &self.files[which];
        let (channel, theirs) = server::channel().expect("descriptors");
        let mut bytes = message([input.number(), 0, 0, 0]);
        match input.byte() % 4 {
            0 => bytes = input.bytes(64),
            1 => bytes.truncate(input.below(40)),
            2 => bytes.extend(input.bytes(8)),
            _ => {}
        }
        // No channel, its own file, or a file that is no socket.
        let null = File::open("/dev/null").expect("it is there");
        let passed =
            input.pick(&[Some(theirs.as_fd()), None, Some(file.as_fd()), Some(null.as_fd())]);
        // An empty one is the end of a stream, but not of a descriptor.
        if !bytes.is_empty() && server::send(file.as_fd(), &bytes, passed).is_ok() {
            drop(theirs);
            while let Some((message, passed)) = server::receive(channel.as_fd()) {
                let (kind, _) = parts(&message);
                assert!(matches!(kind, DONE | FAILED), "an answer of type {kind} {passed:?}");
            }
        }
        self.end = Some(channel);
    }
}

/// An address in this process's memory, or one where nothing is.
fn place(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        at @ ..=0xef => Memory::get().address(usize::from(at) * (MEMORY / 0x100)),
        far => u64::MAX - u64::from(far),
    }
}

/// A number, with what stands for memory of the process; never another address of this process.
fn tame(number: u64) -> u64 {
    match number {
        value::MEMORY.. if number < value::MEMORY + MEMORY as u64 => {
            Memory::get().address((number - value::MEMORY) as usize)
        }
        0x5000_0000_0000..=0x7fff_ffff_ffff => number & 0xffff_ffff,
        _ => number,
    }
}
