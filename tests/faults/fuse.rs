// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that fails or hangs when it is told to: a file of FUSE.

use std::ffi::OsStr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use tempfile::TempDir;
use twostage::patience::{wait_until, PATIENCE};

pub const SIZE: u64 = 1 << 20;
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(60);

/// The disk, as long as it is mounted.
pub struct FaultyDisk {
    // Unmounted before the folder is removed.
    _session: BackgroundSession,
    folder: TempDir,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// What cannot be read or written, and the error.
    bad: Option<(Range<u64>, Errno)>,
    bad_flush: Option<Errno>,
    /// Nothing is answered.
    holds: bool,
    held: Vec<Held>,
}

/// A request without an answer.
enum Held {
    Read(u64, u32, ReplyData),
    Write(u64, Vec<u8>, ReplyWrite),
    Flush(ReplyEmpty),
}

impl FaultyDisk {
    /// A disk of zeroes. `direct`: each request comes here, from no cache of the kernel's, and who
    /// makes it waits for the answer whatever happens.
    pub fn new(direct: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bytes = vec![0; SIZE as usize];
        let state = Arc::new(Mutex::new(State { bytes, ..State::default() }));
        let server = Server { state: state.clone(), direct };
        let mut config = Config::default();
        // The machine becomes another user.
        config.acl = SessionACL::All;
        let session = fuser::spawn_mount(server, folder.path(), &config).unwrap();
        Self { _session: session, folder, state }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// For --disk.
    pub fn option(&self) -> String {
        format!("path={}", self.path().display())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What of `range` is read or written fails with `error` from now on.
    pub fn fail(&self, range: Range<u64>, error: Errno) {
        self.state().bad = Some((range, error));
    }

    pub fn fail_flushes(&self, error: Option<Errno>) {
        self.state().bad_flush = error;
    }

    /// Nothing is answered from now on, for one and a half [`PATIENCE`] at most: a test that fails
    /// waits for its machine, which may wait for the disk.
    pub fn hold(&self) {
        self.state().holds = true;
        let state = self.state.clone();
        thread::spawn(move || {
            thread::sleep(PATIENCE * 3 / 2);
            state.lock().unwrap().let_go();
        });
    }

    pub fn wait_for_held(&self, count: usize) {
        wait_until("requests without an answer", || self.state().held.len() >= count);
    }

    /// Answers everything.
    pub fn let_go(&self) {
        self.state().let_go();
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl State {
    fn let_go(&mut self) {
        self.holds = false;
        let held = std::mem::take(&mut self.held);
        held.into_iter().for_each(|held| self.answer(held));
    }

    fn take(&mut self, held: Held) {
        match self.holds {
            true => self.held.push(held),
            false => self.answer(held),
        }
    }

    fn answer(&mut self, held: Held) {
        match held {
            Held::Read(offset, length, reply) => match self.good(offset, length.into()) {
                Ok(range) => reply.data(&self.bytes[range]),
                Err(error) => reply.error(error),
            },
            Held::Write(offset, bytes, reply) => match self.good(offset, bytes.len() as u64) {
                Ok(range) => {
                    let length = range.len();
                    self.bytes[range].copy_from_slice(&bytes[..length]);
                    reply.written(length as u32);
                }
                Err(error) => reply.error(error),
            },
            Held::Flush(reply) => match self.bad_flush {
                Some(error) => reply.error(error),
                None => reply.ok(),
            },
        }
    }

    /// What can be read or written of this: up to the first byte that cannot.
    fn good(&self, offset: u64, length: u64) -> Result<Range<usize>, Errno> {
        let start = offset.min(SIZE);
        let mut end = (start + length).min(SIZE);
        if let Some((bad, error)) = &self.bad {
            if bad.contains(&start) {
                return Err(*error);
            }
            if start < bad.start {
                end = end.min(bad.start);
            }
        }
        Ok(start as usize..end as usize)
    }
}

struct Server {
    state: Arc<Mutex<State>>,
    direct: bool,
}

impl Server {
    fn attributes(inode: INodeNo) -> FileAttr {
        let is_file = inode == FILE;
        FileAttr {
            ino: inode,
            size: if is_file { SIZE } else { 0 },
            blocks: SIZE / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o777,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => reply.entry(&TTL, &Self::attributes(FILE), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &Self::attributes(inode));
    }

    /// Nothing changes: a file that is to be emptied is none for a disk.
    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &Self::attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = if self.direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.state.lock().unwrap().take(Held::Read(offset, size, reply));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.state.lock().unwrap().take(Held::Write(offset, data.to_vec(), reply));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.state.lock().unwrap().take(Held::Flush(reply));
    }
}
