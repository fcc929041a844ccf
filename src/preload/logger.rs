// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The library's messages on the program's standard error: errors, and more if the environment says
//! so.

use std::env;
use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

/// `off`, `error` (the default), `warn`, `info`, `debug` or `trace`.
const LEVEL_VARIABLE: &str = "TWOSTAGE_IOMMUFD_LOG";

/// Maximum length of a line, in bytes.
const LONGEST: usize = 1024;

struct StandardError;

impl Log for StandardError {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    /// Allocates no memory: the message may be about a call of an allocator.
    fn log(&self, record: &Record<'_>) {
        let mut buffer = [0; LONGEST];
        // If it cannot be written, nothing can be done.
        let _ = std::io::stderr().write_all(line(&mut buffer, record));
    }

    fn flush(&self) {}
}

/// The line for `record`, truncated to `buffer`.
fn line<'a>(buffer: &'a mut [u8; LONGEST], record: &Record<'_>) -> &'a [u8] {
    let mut rest = &mut buffer[..LONGEST - 1];
    // Fails when the buffer is full.
    let _ = write!(rest, "twostage-iommufd: {}: {}", record.level(), record.args());
    let length = LONGEST - 1 - rest.len();
    buffer[length] = b'\n';
    &buffer[..=length]
}

/// Starts logging, according to the environment.
pub fn start() {
    let level = env::var(LEVEL_VARIABLE).ok().and_then(|level| level.parse().ok());
    if log::set_logger(&StandardError).is_ok() {
        log::set_max_level(level.unwrap_or(LevelFilter::Error));
    }
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    fn logged(message: &str) -> String {
        let mut buffer = [0; LONGEST];
        let arguments = format_args!("{message}");
        let record = Record::builder().level(Level::Error).args(arguments).build();
        String::from_utf8(line(&mut buffer, &record).to_vec()).unwrap()
    }

    #[test]
    fn a_line_is_cut_off_and_ends() {
        assert_eq!(logged("no"), "twostage-iommufd: ERROR: no\n");
        let long = logged(&"x".repeat(LONGEST));
        assert_eq!(long.len(), LONGEST);
        assert!(long.ends_with("xx\n"));
    }
}
