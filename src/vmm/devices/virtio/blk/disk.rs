// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw disk image.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::buffers::{BounceBuffer, PAGE_SIZE};
use super::image_file;
use crate::process::named_file;

/// Bytes of a sector, the unit of addresses (virtio 1.3 §5.2.6).
pub const SECTOR_SIZE: u64 = 512;
/// Image formats other than raw: offset of the magic, the magic, and `qemu-img`'s name of the
/// format. Only magics that a raw disk does not have by accident.
const MARKS: [(usize, &[u8], &str); 9] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
];

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("{path}: {source}{}", advice(.source), path = .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("{path}: neither a file nor a block device", path = .0.display())]
    Kind(PathBuf),
    /// Its format is not supported.
    #[error(
        "{path}: an image of format {format}, and disks are raw; convert it with: qemu-img \
         convert -O raw {path} NEW (if it is raw, and the guest wrote that there, say format=raw)",
        path = .path.display()
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// The name that `qemu-img` uses.
        format: &'static str,
    },
    /// The kernel has the block device read-only.
    #[error("{path}: the block device is read-only; say readonly=on", path = .0.display())]
    ReadOnlyDevice(PathBuf),
    /// The block device cannot be claimed.
    #[error(
        "{path}: the block device is in use: mounted, part of another device, or another machine's \
         or --disk's",
        path = .0.display()
    )]
    Claimed(PathBuf),
    /// The image is locked by another process.
    #[error(
        "{path}: the image is in use, by another machine or another --disk; it can be shared with \
         readonly=on only",
        path = .0.display()
    )]
    InUse(PathBuf),
    /// The image is empty.
    #[error("{path}: the image is empty", path = .0.display())]
    Empty(PathBuf),
    /// The size is not a multiple of the block size.
    #[error("{path}: {size} bytes are not a multiple of {block} bytes", path = .path.display())]
    Unaligned {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Block size in bytes.
        block: u32,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => "; a read-only file needs readonly=on",
        Some(libc::EINVAL) => "; not every file system supports direct=on",
        _ => "",
    }
}

/// How to open an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskAccess {
    /// Read-only.
    pub read_only: bool,
    /// Bypassing the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Known to be raw: the format is not probed from its first bytes, which a guest may have
    /// written.
    pub raw: bool,
}

/// A raw disk image.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    file: Arc<File>,
    size: u64,
    block_size: u32,
    read_only: bool,
    in_memory: bool,
    lost: bool,
    id: String,
    /// Holds the lock of a block device, shared by all of its device nodes.
    _common: Option<File>,
}

impl Disk {
    /// Opens the image at `path`. While it is open, others can open it only if nobody writes to it.
    ///
    /// # Errors
    /// It cannot be opened, is locked by somebody else, or is not a raw disk.
    pub fn open(path: &Path, access: DiskAccess) -> Result<Self, DiskError> {
        let DiskAccess { read_only, direct, raw } = access;
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        let mut file = open_file(path, read_only, direct)?;
        let metadata = file.metadata().map_err(failed)?;
        let is_device = metadata.file_type().is_block_device();
        let common = lock_all(path, &file, is_device, !read_only)?;
        // Metadata do not have the size of a block device.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 {
            return Err(DiskError::Empty(path.to_owned()));
        }
        let block_size = match (direct, is_device) {
            (false, _) => SECTOR_SIZE as u32,
            (true, true) => image_file::sector_size(&file).map_err(failed)?,
            (true, false) => direct_block_size(&file).map_err(failed)?,
        };
        let mut head = BounceBuffer::new(block_size as usize);
        let length = file.read_at(head.bytes(), 0).map_err(failed)?;
        // Never more than the buffer holds.
        if let Some(format) = format_of(&head.bytes()[..length]).filter(|_| !raw) {
            return Err(DiskError::Format { path: path.to_owned(), format });
        }
        if !size.is_multiple_of(block_size.into()) {
            return Err(DiskError::Unaligned { path: path.to_owned(), size, block: block_size });
        }
        let id = format!("{:x}-{:x}", metadata.dev(), metadata.ino());
        // If it is unknown, somebody waits for it.
        let in_memory = image_file::is_memory(&file).unwrap_or_default();
        let (path, file) = (path.to_owned(), Arc::new(file));
        let (lost, _common) = (false, common);
        Ok(Self { path, file, size, block_size, read_only, in_memory, lost, id, _common })
    }

    /// A disk backed by `file`, of any kind.
    #[cfg(test)]
    pub(super) fn of(file: File, size: u64) -> Self {
        let (path, id) = ("test".into(), "0-0".into());
        let file = Arc::new(file);
        Self {
            path,
            file,
            size,
            block_size: 512,
            read_only: false,
            in_memory: false,
            lost: false,
            id,
            _common: None,
        }
    }

    /// Size in bytes: a multiple of the block size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The granularity of requests in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether it is read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// An identifier in ASCII that tells disks apart.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the `length` bytes at `offset` are whole blocks of the disk.
    pub fn has(&self, offset: u64, length: u64) -> bool {
        let block = u64::from(self.block_size);
        let end = offset.checked_add(length);
        let whole = offset.is_multiple_of(block) && length.is_multiple_of(block);
        whole && end.is_some_and(|end| end <= self.size)
    }

    /// Whether its contents are memory of the host, as the guest's are: no disk is waited for.
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// From now on it is waited for, as if its image were not in memory.
    #[cfg(any(test, feature = "test-support"))]
    pub(super) fn wait_for(&mut self) {
        self.in_memory = false;
    }

    /// A flush has failed with `error`. What was written before it may be lost, and the system says
    /// so only once for each time that the image is opened (Linux `errseq_t`).
    pub fn flush_failed(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.lost, true) {
            log::error!(
                "{}: a flush fails: {error}; what was written may be lost, and all flushes fail \
                 until the image is opened again",
                self.path.display()
            );
        }
    }

    /// Whether a flush has failed: no later one can promise anything.
    pub fn may_have_lost_writes(&self) -> bool {
        self.lost
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file or block device.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// Opens the file or block device at `path`. A writable block device is claimed.
fn open_file(path: &Path, read_only: bool, direct: bool) -> Result<File, DiskError> {
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    let open = |flags| {
        let direct = if direct { libc::O_DIRECT } else { 0 };
        named_file::open(path, File::options().read(true).write(!read_only), direct | flags)
    };
    let kind = |file: &File| Ok(file.metadata().map_err(failed)?.file_type());
    let file = open(0).map_err(failed)?;
    match kind(&file)? {
        kind if kind.is_file() => return Ok(file),
        kind if !kind.is_block_device() => return Err(DiskError::Kind(path.to_owned())),
        _ if read_only => return Ok(file),
        _ => {}
    }
    if image_file::is_read_only(&file).map_err(failed)? {
        return Err(DiskError::ReadOnlyDevice(path.to_owned()));
    }
    // A writer needs exclusive access through all device nodes. A claim cannot express read-only
    // use, so every claim is exclusive.
    let file = open(libc::O_EXCL).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => DiskError::Claimed(path.to_owned()),
        _ => failed(error),
    })?;
    // The path may name something else by now.
    match kind(&file)?.is_block_device() {
        true => Ok(file),
        false => Err(DiskError::Kind(path.to_owned())),
    }
}

/// Takes the locks of `file`, and for a block device also those shared by all its nodes, which are
/// held as long as the returned file.
fn lock_all(
    path: &Path,
    file: &File,
    is_device: bool,
    writes: bool,
) -> Result<Option<File>, DiskError> {
    let locked = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(DiskError::InUse(path.to_owned()))
        }
        // As QEMU does: not every file system supports locks.
        Err(error) => {
            log::warn!("{}: it cannot be locked: {error}", path.display());
            Ok(())
        }
        Ok(()) => Ok(()),
    };
    locked(image_file::lock(file, writes))?;
    if !is_device {
        return Ok(None);
    }
    match image_file::common_file(file) {
        Ok(common) => {
            locked(image_file::lock_shared(&common, writes))?;
            Ok(Some(common))
        }
        Err(error) => {
            log::warn!("{}: only this device node can be locked: {error}", path.display());
            Ok(None)
        }
    }
}

/// The alignment that direct I/O on `file` needs: found by trying, as there is no better way.
fn direct_block_size(file: &File) -> io::Result<u32> {
    let mut buffer = BounceBuffer::new(PAGE_SIZE);
    match file.read_at(&mut buffer.bytes()[..SECTOR_SIZE as usize], 0) {
        Ok(_) => Ok(SECTOR_SIZE as u32),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(PAGE_SIZE as u32),
        Err(error) => Err(error),
    }
}

/// The format of an image that starts with `head`, if it is known and not raw.
fn format_of(head: &[u8]) -> Option<&'static str> {
    let has = |at: usize, mark| head.get(at..).is_some_and(|rest| rest.starts_with(mark));
    MARKS.iter().find(|(at, mark, _)| has(*at, mark)).map(|(_, _, name)| *name)
}

/// Opens a disk that the test has closed. A process that another test starts has all descriptors of
/// this one, their locks and claims included, until it executes its program.
#[cfg(test)]
pub(super) fn reopen(path: &Path, access: DiskAccess) -> Result<Disk, DiskError> {
    let mut disk = Disk::open(path, access);
    twostage::patience::wait_until("a closed disk to be free", || {
        if matches!(disk, Err(DiskError::InUse(_) | DiskError::Claimed(_))) {
            disk = Disk::open(path, access);
            return false;
        }
        true
    });
    disk
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const READ_ONLY: DiskAccess = DiskAccess { read_only: true, direct: false, raw: false };

    fn image(length: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; length]).unwrap();
        file
    }

    #[test]
    fn only_whole_sectors_are_a_disk() {
        let error = Disk::open(Path::new("/nonexistent/disk"), DiskAccess::default()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/disk: No such file"), "{error}");
        let error = Disk::open(image(0).path(), DiskAccess::default()).unwrap_err();
        assert!(matches!(error, DiskError::Empty(_)));
        let error = Disk::open(image(1000).path(), DiskAccess::default()).unwrap_err();
        assert!(error.to_string().contains("1000 bytes are not a multiple of 512"), "{error}");
        let error = Disk::open(Path::new("/dev/null"), READ_ONLY).unwrap_err();
        assert!(matches!(error, DiskError::Kind(_)));
    }

    #[test]
    fn what_is_no_file_or_of_another_format_is_refused() {
        let open = |path: &Path| Disk::open(path, READ_ONLY).unwrap_err().to_string();
        for path in ["/", "/dev/zero"] {
            assert!(open(Path::new(path)).contains("neither a file nor a block device"), "{path}");
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"QFI\xfb\0\0\0\x03").unwrap();
        let error = open(file.path());
        assert!(error.contains("qcow2") && error.contains("qemu-img convert -O raw"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn one_writes_or_several_read() {
        let (file, open) = (image(512), |file: &tempfile::NamedTempFile, read_only| {
            Disk::open(file.path(), DiskAccess { read_only, ..DiskAccess::default() })
        });
        let writer = open(&file, false).unwrap();
        for read_only in [false, true] {
            assert!(matches!(open(&file, read_only), Err(DiskError::InUse(_))), "{read_only}");
        }
        drop(writer);
        let first = reopen(file.path(), READ_ONLY).unwrap();
        let _readers = [first, open(&file, true).unwrap()];
        assert!(matches!(open(&file, false), Err(DiskError::InUse(_))));
    }

    #[test]
    fn ranges_are_whole_blocks_that_the_disk_has() {
        let disk = Disk::open(image(4096).path(), READ_ONLY).unwrap();
        assert!(disk.has(0, 4096) && disk.has(512, 0) && disk.has(3584, 512));
        assert!(!disk.has(3584, 1024) && !disk.has(1, 512) && !disk.has(0, 511));
        assert!(!disk.has(u64::MAX - 511, 512));
        assert!(disk.file().write_at(&[1], 0).is_err());
    }

    #[test]
    fn direct_or_not_it_holds_what_was_written() {
        let file = image(16384);
        for direct in [false, true] {
            let disk = match reopen(file.path(), DiskAccess { direct, ..DiskAccess::default() }) {
                Ok(disk) => disk,
                // Not every file system on a test machine supports O_DIRECT.
                Err(DiskError::Open { source, .. })
                    if source.raw_os_error() == Some(libc::EINVAL) =>
                {
                    continue
                }
                Err(error) => panic!("{error}"),
            };
            let mut buffer = BounceBuffer::new(8192);
            assert_eq!(buffer.bytes().as_ptr() as usize % 4096, 0);
            buffer.bytes().fill(u8::from(direct));
            disk.file().write_all_at(buffer.bytes(), 4096).unwrap();
            buffer.bytes().fill(9);
            disk.file().read_exact_at(&mut buffer.bytes()[..4096], 8192).unwrap();
            assert!(buffer.bytes()[..4096].iter().all(|byte| *byte == u8::from(direct)));
            assert!(disk.file().read_exact_at(buffer.bytes(), 16384).is_err());
        }
    }

    #[test]
    fn formats_are_told_by_their_marks_alone() {
        for (at, mark, name) in MARKS {
            let mut head = vec![0; 512];
            head[at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(format_of(&head), Some(name));
            head.insert(0, 0);
            assert_eq!(format_of(&head), None, "{name}, a byte further");
            assert_eq!(format_of(&mark[..mark.len() - 1]), None);
        }
        assert_eq!(format_of(&[]), None);
        // An MBR.
        let mut head = vec![0; 512];
        head[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(format_of(&head), None);
    }
}
