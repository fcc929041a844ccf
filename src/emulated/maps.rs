// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mappings of a process, from `/proc/PID/maps`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

/// A file, as the list names it: device and inode.
pub type FileKey = (String, u64);

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// Writes go to the file, or to other processes.
    pub shared: bool,
    /// Its offset in the file, in bytes.
    pub offset: u64,
    /// The file. Unnamed shared memory has one, too.
    pub file: FileKey,
}

impl Mapping {
    /// Parses one line of the list.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let rights = fields.next()?.as_bytes();
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            readable: *rights.first()? == b'r',
            writable: *rights.get(1)? == b'w',
            shared: *rights.get(3)? == b's',
            offset: hex(fields.next()?)?,
            file: (fields.next()?.to_owned(), fields.next()?.parse().ok()?),
        })
    }

    /// Whether `address` is in it.
    pub fn has(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// Its length, in bytes.
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Its link in `/proc`, which opens the mapped file.
    pub fn link(&self, pid: i32) -> String {
        format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end)
    }
}

/// All mappings of process `pid`, as they are now.
///
/// # Errors
/// The process is gone, or `/proc` cannot be read.
pub fn list(pid: i32) -> io::Result<Vec<Mapping>> {
    let parse = |line: io::Result<String>| line.map(|line| Mapping::parse(&line)).transpose();
    lines(pid)?.filter_map(parse).collect()
}

/// The mapping of process `pid` that contains `address`; also none if the process is gone.
pub fn find(pid: i32, address: u64) -> Option<Mapping> {
    let lines = lines(pid).ok()?.map_while(Result::ok);
    lines.filter_map(|line| Mapping::parse(&line)).find(|mapping| mapping.has(address))
}

fn lines(pid: i32) -> io::Result<impl Iterator<Item = io::Result<String>>> {
    Ok(BufReader::new(File::open(format!("/proc/{pid}/maps"))?).lines())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_list() {
        let line = "7f3c00200000-7f3c00210000 rw-s 00001000 00:01 1037 /dev/zero (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.start, mapping.length()), (0x7f3c_0020_0000, 0x1_0000));
        assert!(mapping.readable && mapping.writable && mapping.shared);
        assert_eq!((mapping.offset, mapping.file), (0x1000, ("00:01".to_owned(), 1037)));
        let private = Mapping::parse("1000-2000 r--p 00000000 00:00 0").unwrap();
        assert!(!private.writable && !private.shared);
        assert_eq!(Mapping::parse("1000 r--p 0 00:00 0"), None);
        assert_eq!(Mapping::parse(""), None);
        let file = Mapping::parse("1000-2000 r--p 00003000 08:01 77 /bin/true").unwrap();
        assert_eq!(
            (file.shared, file.offset, file.file),
            (false, 0x3000, ("08:01".to_owned(), 77))
        );
    }

    #[test]
    fn the_mapping_of_a_variable() {
        let variable = Box::new(7u64);
        let address = &raw const *variable as u64;
        let mapping = find(std::process::id() as i32, address).unwrap();
        assert!(mapping.writable && !mapping.shared);
        assert!(mapping.has(address) && !mapping.has(mapping.end));
        assert_eq!(find(std::process::id() as i32, 0), None);
        assert_eq!(find(-1, address), None);
        let list_now = list(std::process::id() as i32).unwrap();
        assert!(list_now.iter().any(|mapping| mapping.has(address)));
        assert!(list(-1).is_err());
    }
}
