// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files that a command line has written: where reports go (`--report`), and that no output
//! overwrites another file of the command line.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::config::{DeviceConfig, MachineConfig, SerialConfig};
use crate::console::deadline::{self, Patient, Turn};
use crate::console::output;
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
}

/// Where reports go.
#[derive(Debug)]
pub struct Reports {
    option: ReportOption,
    /// Stays open: a jailed process opens none.
    file: Option<File>,
    /// It can be truncated. A jailed process does not ask again.
    is_file: bool,
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
        Ok(Self { format, file })
    }
}

impl ReportOption {
    /// The file for reports, if not standard error.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Opens or creates the report file, before a machine runs for nothing.
    ///
    /// # Errors
    /// Read-only.
    pub fn open(&self) -> Result<Reports, ReportError> {
        let open = |path| named_file::open(path, OpenOptions::new().create(true).append(true), 0);
        let file = self.file().map(open).transpose().map_err(|source| self.failed(source))?;
        let is_file = |file: &File| file.metadata().map(|metadata| metadata.is_file());
        let is_file = file.as_ref().map(is_file).transpose();
        let is_file = is_file.map_err(|source| self.failed(source))?.unwrap_or(false);
        Ok(Reports { option: self.clone(), file, is_file, at: 0 })
    }

    fn failed(&self, source: io::Error) -> ReportError {
        let to = self.file().map_or("standard error".into(), |path| path.display().to_string());
        ReportError { to, source }
    }
}

impl Reports {
    /// A new life: appends to the file from now on.
    pub fn next_life(&mut self) {
        let length = |file: &File| file.metadata().map_or(0, |file| file.len());
        self.at = self.file.as_ref().map_or(0, length);
    }

    /// Writes `report`, replacing the last one of this life.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, report: &Report) -> Result<(), ReportError> {
        self.try_write(report).map_err(|source| self.option.failed(source))
    }

    fn try_write(&self, report: &Report) -> io::Result<()> {
        let text = match self.option.format {
            None => return Ok(()),
            Some(Format::Text) => report.to_string(),
            Some(Format::Json) => serde_json::to_string_pretty(report)? + "\n",
        };
        let Some(file) = &self.file else { return output::write_to_standard_error(&text) };
        // It is written at its end.
        if self.is_file {
            file.set_len(self.at)?;
        }
        // Anything else may have a slow reader.
        let until = deadline::of(Turn::Report).unwrap_or_else(deadline::soon);
        Patient::until(file, until).write_all(text.as_bytes())
    }
}

/// One file named on the command line.
#[derive(Debug, Clone, Copy)]
struct Named<'a> {
    option: &'static str,
    path: &'a Path,
    /// It is created or emptied.
    output: bool,
}

/// Identifies a file regardless of its name.
#[derive(Debug, PartialEq, Eq)]
enum Identity {
    /// Device and inode of an existing file.
    There(u64, u64),
    /// Number of a block device, which may have several nodes.
    BlockDevice(u64),
    /// Folder and name of a file to be created.
    Absent(PathBuf, OsString),
}

/// Finds two options of `config`, or `report`'s file, that name the same file, which one of them
/// would overwrite.
pub(super) fn check_outputs(config: &MachineConfig, report: Option<&Path>) -> Result<(), String> {
    let mut named = vec![Named { option: "--kernel", path: &config.payload.kernel, output: false }];
    let initramfs = config.payload.initramfs.iter();
    named.extend(initramfs.map(|path| Named { option: "--initramfs", path, output: false }));
    let modules = config.payload.modules.iter();
    named.extend(modules.map(|module| Named {
        option: "--module",
        path: &module.path,
        output: false,
    }));
    for device in &config.devices {
        if let DeviceConfig::Disk(disk) = device {
            named.push(Named { option: "--disk", path: &disk.path, output: false });
        }
    }
    if let SerialConfig::File(path) | SerialConfig::Append(path) = &config.serial {
        named.push(Named { option: "--serial", path, output: true });
    }
    let trace = config.trace.iter();
    named.extend(trace.map(|path| Named { option: "--trace", path, output: true }));
    named.extend(report.map(|path| Named { option: "--report", path, output: true }));

    for (index, one) in named.iter().enumerate() {
        for other in named.iter().skip(index + 1) {
            let same = || identity(one.path).is_some_and(|id| Some(id) == identity(other.path));
            if (one.output || other.output) && same() {
                return Err(format!(
                    "{} and {} name the same file, {}; one would overwrite the other",
                    one.option,
                    other.option,
                    other.path.display()
                ));
            }
        }
    }
    Ok(())
}

/// `None` for files that cannot be overwritten, such as `/dev/null` or a terminal, or cannot exist.
fn identity(path: &Path) -> Option<Identity> {
    match fs::metadata(path) {
        Ok(there) if there.is_file() || there.is_dir() => {
            Some(Identity::There(there.dev(), there.ino()))
        }
        Ok(there) if there.file_type().is_block_device() => {
            Some(Identity::BlockDevice(there.rdev()))
        }
        Ok(_) => None,
        Err(_) => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
            Some(Identity::Absent(parent, path.file_name()?.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use twostage::skips::not_tested;

    use super::*;
    use crate::config::{testing, DiskConfig, IommuChoice};
    use crate::devices::virtio::DiskAccess;

    #[test]
    fn forms_and_files_are_understood() {
        let parse = |text: &str| text.parse::<ReportOption>();
        let option = |format, file| Ok(ReportOption { format, file });
        assert_eq!(parse("none"), option(None, None));
        assert_eq!(parse("text"), option(Some(Format::Text), None));
        let file = Some(PathBuf::from("/tmp/r"));
        assert_eq!(parse("json,file=/tmp/r"), option(Some(Format::Json), file));
        for text in ["", "xml", "json,", "json,file=", "none,file=/tmp/r", "file=/tmp/r"] {
            assert!(parse(text).unwrap_err().contains(text), "{text}");
        }
    }

    fn config(kernel: &Path) -> MachineConfig {
        let mut config = testing::machine();
        config.payload.kernel = kernel.into();
        config
    }

    #[test]
    fn an_output_is_no_other_file_of_the_command_line() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        let link = directory.path().join("link");
        let new = directory.path().join("new");
        let also_new = directory.path().join("./new");
        fs::write(&kernel, "kernel").unwrap();
        std::os::unix::fs::symlink(&kernel, &link).unwrap();
        let refused = |change: &dyn Fn(&mut MachineConfig), report: Option<&Path>| {
            let mut config = config(&kernel);
            change(&mut config);
            check_outputs(&config, report).unwrap_err()
        };
        let text = refused(&|config| config.trace = Some(kernel.clone()), None);
        assert!(text.contains("--kernel and --trace") && text.contains("kernel"), "{text}");
        let text = refused(&|config| config.serial = SerialConfig::File(link.clone()), None);
        assert!(text.contains("--kernel and --serial"), "{text}");
        let text = refused(&|config| config.trace = Some(new.clone()), Some(&also_new));
        assert!(text.contains("--trace and --report"), "{text}");
        let iommu = IommuChoice::Unsaid;
        let disk = DiskConfig {
            path: new.clone(),
            access: DiskAccess::default(),
            queues: 1,
            iommu,
            bus: None,
        };
        let text = refused(&|c| c.devices = vec![DeviceConfig::Disk(disk.clone())], Some(&new));
        assert!(text.contains("--disk and --report"), "{text}");
    }

    #[test]
    fn nodes_of_a_block_device_are_one_file() {
        let directory = tempfile::tempdir().unwrap();
        let nodes = ["one", "other"].map(|name| directory.path().join(name));
        for node in &nodes {
            // Needs no driver, as it is not opened.
            let made = std::process::Command::new("mknod").arg(node).args(["b", "7", "9"]).status();
            if !made.is_ok_and(|status| status.success()) {
                not_tested("no node of a block device is to be had");
                return;
            }
        }
        assert!(identity(&nodes[0]).is_some());
        assert_eq!(identity(&nodes[0]), identity(&nodes[1]));
    }

    #[test]
    fn files_of_their_own_and_devices_are_fine() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut config = config(&path("kernel"));
        config.payload.initramfs = Some(path("kernel"));
        config.trace = Some(path("trace"));
        config.serial = SerialConfig::File(path("serial"));
        assert_eq!(check_outputs(&config, Some(&path("report"))), Ok(()));
        config.trace = Some("/dev/null".into());
        config.serial = SerialConfig::File("/dev/null".into());
        assert_eq!(check_outputs(&config, None), Ok(()));
    }
}
