// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mappings of a process, from `/proc/PID/maps`.

use std::fs::File;
use std::io::{BufRead, BufReader};

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address, and one past the last.
    pub start: u64,
    pub end: u64,
    pub readable: bool,
    pub writable: bool,
    pub shared: bool,
    /// Its offset in the file, in bytes.
    pub offset: u64,
    /// The file: device and inode. Unnamed shared memory has one, too.
    pub file: (String, u64),
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

    /// Its length, in bytes.
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Its link in `/proc`, which opens the mapped file.
    pub fn link(&self, pid: i32) -> String {
        format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end)
    }
}

/// The mapping of process `pid` that contains `address`; also none if the process is gone.
pub fn find(pid: i32, address: u64) -> Option<Mapping> {
    let list = BufReader::new(File::open(format!("/proc/{pid}/maps")).ok()?);
    find_in(list, |mapping| (mapping.start..mapping.end).contains(&address))
}

/// The first of the mappings in `list` that `wanted` accepts.
pub fn find_in(list: impl BufRead, wanted: impl Fn(&Mapping) -> bool) -> Option<Mapping> {
    list.lines().map_while(Result::ok).filter_map(|line| Mapping::parse(&line)).find(wanted)
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
    }

    #[test]
    fn the_mapping_of_a_variable() {
        let variable = Box::new(7u64);
        let address = &raw const *variable as u64;
        let mapping = find(std::process::id() as i32, address).unwrap();
        assert!(mapping.writable && !mapping.shared);
        assert!(mapping.start <= address && address < mapping.end);
        assert_eq!(find(std::process::id() as i32, 0), None);
        assert_eq!(find(-1, address), None);
    }
}
