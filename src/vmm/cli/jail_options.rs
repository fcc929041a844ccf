// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of the jail: `--jail`, `--uid` and `--gid`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use rustix::process::geteuid;

use crate::config::{ConfigError, DeviceConfig, MachineConfig, SerialConfig, TapConfig};
use crate::process::jail::{can_become, Access, Mode, Reopened, Settings, User};

/// The user and the group that nobody's files belong to.
const NOBODY: u32 = 65534;

#[derive(Debug, Clone, Args)]
pub(super) struct JailArgs {
    /// Whether this process gives up what it does not need, before the guest starts: files,
    /// capabilities, its user, and most system calls, by a filter for each kind of thread
    /// (docs/security.md).
    #[arg(long, value_enum, default_value = "on")]
    jail: JailMode,

    /// User that a process of root becomes in the jail, when everything is open: a number. 0: none.
    /// With --on-reset restart it stays root, without most capabilities, as it opens its files
    /// again. [default: 65534, nobody, where there is such a user]
    #[arg(long, value_name = "NUMBER", value_parser = number())]
    uid: Option<u32>,

    /// Group that it has then. [default: 65534]
    #[arg(long, value_name = "NUMBER", value_parser = number())]
    gid: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum JailMode {
    /// A call that is not allowed ends the process, with one line that says which.
    On,
    /// There is no jail.
    Off,
    /// There are only filters, and calls that they would refuse are made, and recorded in the
    /// kernel's log.
    Log,
}

/// The highest number means something else to the system.
fn number() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(..i64::from(u32::MAX))
}

impl JailArgs {
    /// What they say; `again`: the machine that is built again in the jail.
    ///
    /// # Errors
    /// They contradict each other, or this user cannot become another.
    pub fn settings(&self, again: Option<&MachineConfig>) -> Result<Settings, ConfigError> {
        let restarts = again.is_some();
        let mode = match self.jail {
            JailMode::On => Mode::On,
            JailMode::Off => Mode::Off,
            JailMode::Log => Mode::Log,
        };
        let user = User { uid: self.uid.unwrap_or(NOBODY), gid: self.gid.unwrap_or(NOBODY) };
        let named = match (self.uid, self.gid) {
            (None | Some(0), None) => None,
            (None | Some(0), Some(_)) => Some("--gid"),
            (Some(_), _) => Some("--uid"),
        };
        let contradiction = if mode != Mode::On {
            Some("say --jail on, too")
        } else if !geteuid().is_root() {
            Some("only root can become another user")
        } else if restarts {
            Some("with --on-reset restart it stays the user that it is")
        } else if self.uid == Some(0) {
            Some("with --uid 0 it stays the user that it is")
        } else {
            None
        };
        if let (Some(option), Some(why)) = (named, contradiction) {
            return Err(ConfigError::User { option, why });
        }
        let becomes = mode == Mode::On && geteuid().is_root() && user.uid != 0 && !restarts;
        // Who has not asked for it stays root where that is impossible.
        let becomes = becomes && (named.is_some() || can_become(user));
        let reopened = again.map(reopened);
        Ok(Settings { mode, user: becomes.then_some(user), reopened })
    }
}

/// What building `config` again opens.
fn reopened(config: &MachineConfig) -> Vec<Reopened> {
    let of = |path: &Path, access| Reopened { path: path.to_owned(), access };
    let read = |path: &Path| of(path, Access::Read);
    let write = |path: &Path| of(path, Access::Write);
    let payload = &config.payload;
    let mut all = vec![read(&payload.kernel), write(Path::new("/dev/kvm"))];
    all.extend(payload.initramfs.iter().map(|path| read(path)));
    all.extend(payload.modules.iter().map(|module| read(&module.path)));
    // The input, where it is a terminal; and what the system says of itself.
    all.extend(["/proc/self/fd/0", "/proc", "/sys"].map(|path| read(Path::new(path))));
    for device in &config.devices {
        match device {
            DeviceConfig::Disk(disk) if disk.access.read_only => all.push(read(&disk.path)),
            DeviceConfig::Disk(disk) => all.push(write(&disk.path)),
            DeviceConfig::Net(net) if matches!(net.tap, TapConfig::Name(_)) => {
                all.push(write(Path::new("/dev/net/tun")));
            }
            DeviceConfig::Rng(rng) => all.push(read(&rng.source)),
            DeviceConfig::Vfio(vfio) => all.extend(vfio_node(&vfio.path).map(|node| write(&node))),
            DeviceConfig::Net(_) | DeviceConfig::Edu(_) => {}
        }
    }
    all.extend(config.kernel_host().iter().map(|path| write(path)));
    if let SerialConfig::File(path) | SerialConfig::Append(path) = &config.serial {
        all.push(write(path));
    }
    all
}

/// The node in /dev of the device that sysfs has at `path`, or `path` if it is that.
fn vfio_node(path: &Path) -> Option<PathBuf> {
    let nodes = Path::new("/dev/vfio/devices");
    if path.starts_with(nodes) {
        return Some(path.to_owned());
    }
    let entry = fs::read_dir(path.join("vfio-dev")).ok()?.find_map(Result::ok)?;
    Some(nodes.join(entry.file_name()))
}
