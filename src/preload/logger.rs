// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this library has to say, on the program's standard error: errors, and more when the
//! environment asks for it.
#![forbid(unsafe_code)]

use std::env;
use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

/// `off`, `error` (the default), `warn`, `info`, `debug` or `trace`.
const LEVEL_VARIABLE: &str = "TWOSTAGE_IOMMUFD_LOG";

struct StandardError;

impl Log for StandardError {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = format!("twostage-iommufd: {}: {}\n", record.level(), record.args());
        // There is nobody to tell when it cannot be written.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Begins to log, as the environment asks.
pub fn start() {
    let level = env::var(LEVEL_VARIABLE).ok().and_then(|level| level.parse().ok());
    if log::set_logger(&StandardError).is_ok() {
        log::set_max_level(level.unwrap_or(LevelFilter::Error));
    }
}
