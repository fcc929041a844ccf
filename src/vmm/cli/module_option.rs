// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--module`.

use std::path::PathBuf;
use std::str::FromStr;

use super::options::Pairs;
use crate::config::ModuleConfig;

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
mod tests {
    use super::super::options::testing::refused;
    use super::*;

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
}
