// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files of a command line: outputs must differ from all other files.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::{DeviceConfig, MachineConfig, SerialConfig};

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
    use super::*;
    use crate::config::{testing, DiskConfig, IommuChoice};
    use crate::devices::virtio::DiskAccess;

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
        let disk = DiskConfig { path: new.clone(), access: DiskAccess::default(), iommu };
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
                eprintln!("no node of a block device is had: NOT tested");
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
