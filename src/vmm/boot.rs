// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Boot: loads a kernel image into guest memory and determines the first vCPU's initial state.
//!
//! Image formats and boot protocols belong to the architecture ([`arch::boot`](crate::arch::boot)).
//! An image is untrusted: every number in it is checked against the file and guest memory.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use crate::arch::boot::{Image, ImageError, StartState, MEMORY_MIN, MODULE_CMDLINE_MAX};
use crate::config::PayloadConfig;
use crate::memory::MachineMemory;
use crate::process::named_file;

/// The option for modules.
const MODULE: &str = "--module";
/// Alignment of modules, in bytes.
const MODULE_ALIGNMENT: u64 = 4096;
/// How much of a kernel is read to identify it, in bytes.
const HEADER: u64 = 4096;

/// Why a machine cannot boot its payload.
#[derive(Debug)]
pub struct BootError {
    what: &'static str,
    path: Option<PathBuf>,
    reason: Reason,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{} {}: {}", self.what, path.display(), self.reason),
            None => write!(f, "{}: {}", self.what, self.reason),
        }
    }
}

impl std::error::Error for BootError {}

impl BootError {
    /// Whether the cause is `--memory`, not a file.
    pub fn is_of_memory_size(&self) -> bool {
        matches!(self.reason, Reason::MemoryTooSmall(_))
    }
}

/// What is wrong with a file, or with its place in memory.
#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("not a regular file")]
    NotAFile,
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{length} bytes; the kernel has room for {max}")]
    CmdlineTooLong { length: usize, max: usize },
    #[error("{}", too_many_modules(*.0))]
    TooManyModules(usize),
    #[error("contains a zero byte")]
    CmdlineZero,
    #[error("{0} bytes do not fit into guest memory beside the kernel")]
    NoRoom(u64),
    #[error("{length} bytes, and guest memory has {max}: {error}")]
    TooLong { length: u64, max: u64, error: ImageError },
    #[error(
        "{0:#x} bytes of guest memory are too few to boot; more than {MEMORY_MIN:#x} are needed"
    )]
    MemoryTooSmall(u64),
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

fn too_many_modules(max: usize) -> String {
    match max {
        1 => "this kernel takes one file, without a command line: say --initramfs".to_owned(),
        max => format!("one too many: there is room for {max}"),
    }
}

/// Memory that holds a file for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// The boot information for a kernel, whatever the protocol.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "for kernels of PCs"))]
pub struct BootInfo<'a> {
    /// The machine's memory.
    pub memory: &'a MachineMemory,
    /// The command line, no longer than the image allows, without a zero byte.
    pub cmdline: &'a str,
    /// The kernel's file name.
    pub name: &'a str,
    /// The modules, the initramfs first; no more than the image allows.
    pub modules: &'a [NamedModule<'a>],
}

impl BootInfo<'_> {
    /// The initramfs, for a kernel that takes no other modules.
    pub fn initramfs(&self) -> Option<Module> {
        self.modules.first().map(|module| module.memory)
    }
}

/// A module for a kernel.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "for kernels of PCs"))]
pub struct NamedModule<'a> {
    /// Its memory.
    pub memory: Module,
    /// Its file name.
    pub name: &'a str,
    /// Its command line, without a zero byte.
    pub cmdline: &'a str,
}

/// Loads `payload` into `memory`.
///
/// # Errors
/// The file and what is wrong with it.
pub fn load(memory: &MachineMemory, payload: &PayloadConfig) -> Result<StartState, BootError> {
    if memory.low_size() <= MEMORY_MIN {
        let reason = Reason::MemoryTooSmall(memory.low_size());
        return Err(BootError { what: "--memory", path: None, reason });
    }
    let in_kernel =
        |reason| BootError { what: "--kernel", path: Some(payload.kernel.clone()), reason };
    let max = memory.low_size();
    let (bytes, length) = read_kernel(&payload.kernel, max).map_err(in_kernel)?;
    let in_image = |error: ImageError| match length > max {
        true => in_kernel(Reason::TooLong { length, max, error }),
        false => in_kernel(error.into()),
    };
    let image = Image::parse(&bytes).map_err(in_image)?;
    image.check(memory).map_err(in_image)?;

    check_cmdline(&payload.cmdline, image.cmdline_max()).map_err(|reason| BootError {
        what: "--cmdline",
        path: None,
        reason,
    })?;
    let mut modules = Vec::new();
    let (first, mut end) = image.module_range(memory);
    for file in files(payload) {
        let in_file =
            |reason| BootError { what: file.option, path: Some(file.path.to_owned()), reason };
        if modules.len() == image.modules_max()
            || (file.option == MODULE && image.modules_max() == 1)
        {
            return Err(in_file(Reason::TooManyModules(image.modules_max())));
        }
        if file.option == MODULE {
            check_cmdline(file.cmdline, MODULE_CMDLINE_MAX).map_err(in_file)?;
        }
        let module = place_module(memory, (first, end), file.path).map_err(in_file)?;
        end = module.start;
        modules.push((module, file_name(file.path), file.cmdline));
    }
    let modules: Vec<_> = modules
        .iter()
        .map(|(memory, name, cmdline)| NamedModule { memory: *memory, name, cmdline })
        .collect();
    let name = file_name(&payload.kernel);
    let info = BootInfo { memory, cmdline: &payload.cmdline, name: &name, modules: &modules };
    image.load(&info).map_err(in_image)
}

/// A file for the kernel, and the option that names it.
struct PayloadFile<'a> {
    option: &'static str,
    path: &'a Path,
    cmdline: &'a str,
}

/// The files besides the kernel, in order.
fn files(payload: &PayloadConfig) -> impl Iterator<Item = PayloadFile<'_>> {
    let initramfs = payload.initramfs.iter().map(|path| PayloadFile {
        option: "--initramfs",
        path,
        cmdline: &payload.cmdline,
    });
    let modules = payload.modules.iter().map(|module| PayloadFile {
        option: MODULE,
        path: &module.path,
        cmdline: &module.cmdline,
    });
    initramfs.chain(modules)
}

/// The file's name, as one word.
fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.replace(|c: char| c.is_whitespace() || c == '\0', "_")
}

/// Opens the file at `path`; returns its length, too.
fn open_file(path: &Path) -> Result<(File, u64), Reason> {
    let file = named_file::open(path, File::options().read(true), 0)?;
    let metadata = file.metadata()?;
    // Reading a directory or device could block or not end.
    match metadata.is_file() {
        true => Ok((file, metadata.len())),
        false => Err(Reason::NotAFile),
    }
}

/// The first `max` bytes of the kernel at `path`, if it is one, and the file's length. What
/// follows, such as debug information, cannot be for a guest with `max` bytes of memory.
fn read_kernel(path: &Path, max: u64) -> Result<(Vec<u8>, u64), Reason> {
    let (file, length) = open_file(path)?;
    let mut bytes = Vec::new();
    (&file).take(HEADER).read_to_end(&mut bytes)?;
    if let Some(error) = Image::parse(&bytes).err().filter(ImageError::is_of_no_kernel) {
        return Err(error.into());
    }
    (&file).take(max.saturating_sub(HEADER)).read_to_end(&mut bytes)?;
    Ok((bytes, length))
}

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), Reason> {
    let length = cmdline.len();
    if length > max {
        return Err(Reason::CmdlineTooLong { length, max });
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(Reason::CmdlineZero);
    }
    Ok(())
}

/// Places a file as high as possible in `range`, from its first address to its end.
fn place_module(memory: &MachineMemory, range: (u64, u64), path: &Path) -> Result<Module, Reason> {
    let (mut file, length) = open_file(path)?;
    let (first, end) = range;
    let start = end
        .checked_sub(length)
        .map(|start| start & !(MODULE_ALIGNMENT - 1))
        .filter(|start| *start >= first)
        .ok_or(Reason::NoRoom(length))?;
    // Its memory has the length of a slice.
    let count = usize::try_from(length).map_err(|_| Reason::NoRoom(length))?;
    memory.map().read_exact_volatile_from(GuestAddress(start), &mut file, count)?;
    Ok(Module { start, length })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A sparse file of `length` bytes.
    fn sparse(start: &[u8], length: u64) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(start).unwrap();
        file.as_file().set_len(length).unwrap();
        file
    }

    #[test]
    fn no_more_is_read_of_a_kernel_than_there_is_memory_and_nothing_of_what_is_none() {
        const LONG: u64 = 1 << 40;
        let none = sparse(b"not a kernel", LONG);
        let error = read_kernel(none.path(), 1 << 40).unwrap_err();
        assert!(matches!(&error, Reason::Image(error) if error.is_of_no_kernel()), "{error}");
        #[cfg(target_arch = "x86_64")]
        {
            let long = sparse(b"\x7fELF\x01\x01\x01", LONG);
            let (bytes, length) = read_kernel(long.path(), 1 << 20).unwrap();
            assert_eq!((bytes.len(), length), (1 << 20, LONG));
            let memory = MachineMemory::new(4 << 20).unwrap();
            let payload = PayloadConfig {
                kernel: long.path().into(),
                initramfs: None,
                modules: Vec::new(),
                cmdline: String::new(),
            };
            let error = load(&memory, &payload).unwrap_err().to_string();
            assert!(error.contains(&format!("{LONG} bytes, and guest memory has")), "{error}");
        }
    }

    #[test]
    fn an_initramfs_goes_where_there_is_room_for_it_and_is_not_read_where_there_is_none() {
        let memory = MachineMemory::new(4 << 20).unwrap();
        let end = memory.ranges().next().map(|(start, length)| start + length).unwrap();
        let range = (end - 0x2000, end);
        let module = place_module(&memory, range, sparse(b"module", 0x1001).path()).unwrap();
        assert_eq!(module, Module { start: end - 0x2000, length: 0x1001 });
        let mut read = [0; 7];
        memory.map().read_slice(&mut read, GuestAddress(module.start)).unwrap();
        assert_eq!(&read, b"module\0");
        let error = place_module(&memory, range, sparse(b"module", 1 << 40).path()).unwrap_err();
        assert!(matches!(error, Reason::NoRoom(length) if length == 1 << 40), "{error}");
    }
}
