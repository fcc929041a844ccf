// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Option values: `key=value,…`, numbers and sizes, and the options of all machines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::str::FromStr;

use crate::config::{ModuleConfig, SerialConfig};

/// `key=value` pairs, each taken at most once.
#[derive(Default)]
pub(super) struct Pairs<'a> {
    pairs: BTreeMap<&'a str, &'a str>,
    /// Keys that were queried: all valid ones.
    known: BTreeSet<&'static str>,
}

impl<'a> Pairs<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, String> {
        let mut pairs = BTreeMap::new();
        for pair in text.split(',') {
            let (key, value) = pair
                .split_once('=')
                .filter(|(key, value)| !key.is_empty() && !value.is_empty())
                .ok_or_else(|| format!("'{pair}' is not of the form key=value"))?;
            if pairs.insert(key, value).is_some() {
                return Err(format!("'{key}' is given twice"));
            }
        }
        Ok(Self { pairs, ..Self::default() })
    }

    /// Takes the value of `key`, parsed by `parse`, or `default` if not given.
    pub(super) fn take<T>(
        &mut self,
        key: &'static str,
        default: T,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, String> {
        self.known.insert(key);
        match self.pairs.remove(key) {
            Some(value) => parse(value).map_err(|error| format!("{key}: {error}")),
            None => Ok(default),
        }
    }

    /// Every key must have been used.
    pub(super) fn finish(self) -> Result<(), String> {
        let known = || self.known.iter().copied().collect::<Vec<_>>().join(", ");
        match self.pairs.keys().next() {
            Some(key) => Err(format!("unknown key '{key}'; known: {}", known())),
            None => Ok(()),
        }
    }
}

pub(super) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{text}' is neither on nor off")),
    }
}

pub(super) fn small(text: &str) -> Result<u8, String> {
    parse_number(text)?.try_into().map_err(|_| format!("'{text}' is more than 255"))
}

/// The name before the pairs, and the pairs.
pub(super) fn named(text: &str) -> Result<(&str, Pairs<'_>), String> {
    match text.split_once(',') {
        Some((name, pairs)) => Ok((name, Pairs::parse(pairs)?)),
        None => Ok((text, Pairs::default())),
    }
}

/// A size in bytes: decimal, or hexadecimal after `0x`, with K, M, G or T for powers of 1024.
///
/// # Errors
/// The text is no such number, or it does not fit 64 bits.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        Some('T' | 't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number = parse_number(digits)
        .map_err(|_| format!("'{text}' is not a size; write bytes, or 512M, 2G"))?;
    number
        .checked_shl(shift)
        .filter(|size| size >> shift == number)
        .ok_or_else(|| format!("'{text}' does not fit 64 bits"))
}

/// A number: decimal, or hexadecimal after `0x`.
///
/// # Errors
/// The text is no such number, or it does not fit 64 bits.
pub(super) fn parse_number(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // `from_str_radix` would accept a sign.
    if digits.starts_with('+') {
        return Err(format!("'{text}' is not a number"));
    }
    u64::from_str_radix(digits, radix).map_err(|_| format!("'{text}' is not a number"))
}

/// `--cpus boot=N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpusOption {
    /// Number of vCPUs.
    pub boot: u8,
}

impl FromStr for CpusOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let boot = pairs.take("boot", 1, small)?;
        pairs.finish()?;
        Ok(Self { boot })
    }
}

/// `--memory size=SIZE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOption {
    /// RAM in bytes.
    pub size: u64,
}

impl MemoryOption {
    /// Default RAM size.
    pub const DEFAULT_SIZE: u64 = 512 << 20;
}

impl FromStr for MemoryOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let size = pairs.take("size", Self::DEFAULT_SIZE, parse_size)?;
        pairs.finish()?;
        Ok(Self { size })
    }
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "tty" => Ok(Self::Tty),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(PathBuf::from(path))),
            _ => Err(format!("'{text}' is none of tty, null, file=PATH")),
        }
    }
}

impl FromStr for ModuleConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Command lines contain commas.
        let (pairs, cmdline) = match text.split_once(",cmdline=") {
            Some((pairs, cmdline)) => (pairs, cmdline),
            None => (text, ""),
        };
        let mut pairs = Pairs::parse(pairs)?;
        let path = pairs.take("path", None, |text| Ok(Some(PathBuf::from(text))))?;
        let known = |error| format!("{error}, cmdline, which comes last");
        pairs.finish().map_err(known)?;
        Ok(Self { path: path.ok_or("path=FILE is missing")?, cmdline: cmdline.to_owned() })
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::str::FromStr;

    /// `text` is refused with an error that contains `hint`.
    pub fn refused<T: FromStr<Err = String>>(text: &str, hint: &str) {
        match text.parse::<T>() {
            Ok(_) => panic!("'{text}' was taken"),
            Err(error) => assert!(error.contains(hint), "'{text}': {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::refused;
    use super::*;

    #[test]
    fn options_are_understood() {
        assert_eq!("boot=4".parse(), Ok(CpusOption { boot: 4 }));
        assert_eq!("size=1G".parse(), Ok(MemoryOption { size: 1 << 30 }));
        assert_eq!("tty".parse(), Ok(SerialConfig::Tty));
        assert_eq!("null".parse(), Ok(SerialConfig::Null));
        assert_eq!("file=/tmp/x".parse(), Ok(SerialConfig::File("/tmp/x".into())));
    }

    #[test]
    fn mistakes_are_named() {
        refused::<CpusOption>("4", "'4'");
        refused::<CpusOption>("boot=300", "boot: '300'");
        refused::<CpusOption>("boot=1,boot=2", "twice");
        refused::<CpusOption>("boot=1,max=2", "unknown key 'max'");
        refused::<CpusOption>("boot=", "'boot='");
        refused::<MemoryOption>("size=lots", "size: 'lots'");
        refused::<SerialConfig>("file=", "'file='");
        refused::<SerialConfig>("pty", "'pty'");
    }

    #[test]
    fn the_command_line_is_the_rest_of_the_value() {
        let module = |path: &str, cmdline: &str| {
            Ok(ModuleConfig { path: path.into(), cmdline: cmdline.to_owned() })
        };
        assert_eq!("path=/a".parse(), module("/a", ""));
        assert_eq!("path=a,cmdline=b=c,d e,cmdline=".parse(), module("a", "b=c,d e,cmdline="));
        refused::<ModuleConfig>("cmdline=a", "unknown key 'cmdline'");
        refused::<ModuleConfig>("path=,cmdline=a", "'path='");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("0x1000"), Ok(4096));
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        assert_eq!(parse_size("0"), Ok(0));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "1.5G", "-1", "+1", "512MB", "ten", "1 G", "é"] {
            assert!(parse_size(text).unwrap_err().contains(text), "{text}");
        }
        assert!(parse_size("16777216T").unwrap_err().contains("64 bits"));
        assert!(parse_size("18446744073709551616").is_err());
    }
}
