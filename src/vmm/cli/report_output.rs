// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--report`: format and destination of reports.

use std::fs::OpenOptions;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::console::deadline::{self, Turn};
use crate::console::output;
use crate::console::patient::Patient;
use crate::process::named_file;
use crate::report::Report;

/// The form of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

/// `--report none|text|json[,file=PATH]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportOption {
    format: Option<Format>,
    file: Option<PathBuf>,
    /// Offset in the file of this life's reports, each of which replaces the last.
    at: u64,
}

/// A report cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("--report: {to}: {source}")]
pub struct ReportError {
    /// The destination.
    to: String,
    source: io::Error,
}

impl FromStr for ReportOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (format, file) = match text.split_once(",file=") {
            Some((format, path)) if !path.is_empty() => (format, Some(PathBuf::from(path))),
            _ => (text, None),
        };
        let format = match format {
            "none" if file.is_none() => None,
            "text" => Some(Format::Text),
            "json" => Some(Format::Json),
            _ => return Err(format!("'{text}' is none of none, text, json[,file=PATH]")),
        };
        Ok(Self { format, file, at: 0 })
    }
}

impl ReportOption {
    /// The file for reports, if not standard error.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Creates the report file, before a machine runs for nothing.
    ///
    /// # Errors
    /// Read-only.
    pub fn create(&self) -> Result<(), ReportError> {
        let Some(path) = &self.file else { return Ok(()) };
        let created = named_file::open(path, OpenOptions::new().create(true).append(true), 0);
        created.map(drop).map_err(|source| self.failed(source))
    }

    /// A new life: appends to the file from now on.
    pub fn next_life(&mut self) {
        let length = |path| std::fs::metadata(path).map_or(0, |file| file.len());
        self.at = self.file().map_or(0, length);
    }

    /// Writes `report`, replacing the last one of this life.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, report: &Report) -> Result<(), ReportError> {
        self.try_write(report).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> ReportError {
        let to = self.file().map_or("standard error".into(), |path| path.display().to_string());
        ReportError { to, source }
    }

    fn try_write(&self, report: &Report) -> io::Result<()> {
        let text = match self.format {
            None => return Ok(()),
            Some(Format::Text) => report.to_string(),
            Some(Format::Json) => serde_json::to_string_pretty(report)? + "\n",
        };
        let Some(path) = &self.file else { return output::write_to_standard_error(&text) };
        let (mut options, first) = (OpenOptions::new(), self.at == 0);
        options.write(true).create(first).truncate(first);
        let mut file = named_file::open(path, &options, 0)?;
        // Only files can be truncated.
        if !first {
            file.set_len(self.at)?;
            file.seek(SeekFrom::End(0))?;
        }
        // Anything else may have a slow reader.
        let until = deadline::of(Turn::Report).unwrap_or_else(deadline::soon);
        Patient::until(file, until).write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_and_files_are_understood() {
        let parse = |text: &str| text.parse::<ReportOption>();
        let option = |format, file| Ok(ReportOption { format, file, at: 0 });
        assert_eq!(parse("none"), option(None, None));
        assert_eq!(parse("text"), option(Some(Format::Text), None));
        let file = Some(PathBuf::from("/tmp/r"));
        assert_eq!(parse("json,file=/tmp/r"), option(Some(Format::Json), file));
        for text in ["", "xml", "json,", "json,file=", "none,file=/tmp/r", "file=/tmp/r"] {
            assert!(parse(text).unwrap_err().contains(text), "{text}");
        }
    }
}
