// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine's `/sys`, as far as programs look for devices there, and the folders of `/dev/vfio`:
//! a folder of ordinary files, links and folders, to which the hooks lead paths that begin with
//! [`AREAS`].
//!
//! It belongs to one process, is locked while that lives, and is removed at its exit. A process
//! that is killed, or calls exec, leaves its folder to the next one that makes its own. Other users
//! cannot look into it. What is written there has no effect.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{symlink, DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::config::{Dma, Iommu};
use crate::files::group::{device_name, Entry};
use crate::sys;
use crate::table::Internal;
use crate::world::Node;

/// What is shown from here instead of the kernel's: these paths, and those below.
const AREAS: [&str; 9] = [
    "/dev/vfio",
    "/sys/bus/pci",
    "/sys/class/iommu",
    "/sys/class/vfio-dev",
    "/sys/devices/virtual/iommu",
    "/sys/kernel/iommu_groups",
    "/sys/module/iommufd",
    "/sys/module/vfio",
    "/sys/module/vfio_pci",
];
/// Followed by a domain and a bus.
const ROOT_BUS: &str = "/sys/devices/pci";

/// The start of the folders' names. They are hidden from `ls`.
const PREFIX: &str = ".twostage-iommufd.";

/// `IORESOURCE_MEM | IORESOURCE_SIZEALIGN`: the flags of a memory BAR of 32 bits.
const MEMORY_BAR: u64 = 0x4_0200;
/// Where the BARs of the first device are to a program that asks, and how much room each has.
const FIRST_BAR: u64 = 0xfe00_0000;
const BAR_ROOM: u64 = 2 << 20;

/// The folder of one process.
#[derive(Debug)]
pub struct Sysfs {
    root: PathBuf,
    /// Keeps others from removing it.
    _lock: Internal,
}

/// Whether `path`, an absolute one, is within what is shown, or was before a `..`.
pub fn is_shown(path: &[u8]) -> bool {
    if path.first() != Some(&b'/') {
        return false;
    }
    // No allocation: every path of the program comes here.
    let parts = path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    let below = |area: &str| {
        let mut parts = parts.clone();
        area.split('/').skip(1).all(|part| parts.next() == Some(part.as_bytes()))
    };
    let mut bus = parts.clone().skip(2);
    AREAS.into_iter().any(below)
        || below("/sys/devices") && bus.next().is_some_and(|part| part.starts_with(b"pci"))
}

/// Whether what is shown is in folders of `path`, one without detours.
fn is_above(path: &[u8]) -> bool {
    let rest = |area: &'static str| area.as_bytes().strip_prefix(path);
    AREAS.into_iter().filter_map(rest).any(|rest| rest.first() == Some(&b'/'))
}

impl Sysfs {
    /// Makes the folder with what `devices` and `iommus` have, in memory if possible.
    ///
    /// # Errors
    /// Neither /dev/shm nor the folder of temporary files can be written; names the latter.
    pub fn new(devices: &BTreeMap<u32, Entry>, iommus: &[Iommu]) -> Result<Self, String> {
        let temporary = std::env::temp_dir();
        let in_folder = |folder: &Path| {
            remove_left(folder);
            let sysfs = Self::empty(folder)?;
            sysfs.fill(devices, iommus)?;
            Ok(sysfs)
        };
        in_folder(Path::new("/dev/shm"))
            .or_else(|_: io::Error| in_folder(&temporary))
            .map_err(|error| format!("{}: {error}; set TMPDIR", temporary.display()))
    }

    fn empty(folder: &Path) -> io::Result<Self> {
        // Of the next process with this ID, the folder may be there still; and another process may
        // remove a new one before it is locked.
        const TURNS: u32 = 16;
        for turn in 0..TURNS {
            let root = folder.join(format!("{PREFIX}{}.{turn}", sys::process_id()));
            match DirBuilder::new().mode(0o700).create(&root) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            match lock(&root) {
                // As the kernel names it: there may be a link on the way, or it may be relative.
                Some(lock) if root.exists() => {
                    return Ok(Self { root: fs::canonicalize(root)?, _lock: lock });
                }
                _ => {}
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// `path`, an absolute one, without empty parts, `.`, and what `..` takes back of a path that
    /// is shown or above one; `..` elsewhere stays. None if that is not there.
    pub fn plain(&self, path: &[u8]) -> Option<Vec<u8>> {
        let mut plain = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." if is_shown(&plain) => {
                    // Of what a link leads to. With the separator: not of a file.
                    let folder = self.inner(&[&plain, &b"/"[..]].concat())?;
                    let real = fs::canonicalize(Path::new(OsStr::from_bytes(folder.as_bytes())));
                    let real = real.ok()?.into_os_string().into_vec();
                    // The hook of realpath may have translated it already.
                    let real = self.outer(&real).unwrap_or(&real);
                    let parent = real.iter().rposition(|byte| *byte == b'/')?;
                    plain = real.get(..parent)?.to_vec();
                }
                // No links.
                b".." if is_above(&plain) => {
                    plain.truncate(plain.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                }
                part => {
                    plain.push(b'/');
                    plain.extend(part);
                }
            }
        }
        // What ends so must be a folder.
        if plain.is_empty() || path.ends_with(b"/") || path.ends_with(b"/.") {
            plain.push(b'/');
        }
        Some(plain)
    }

    /// What stands for `path`, which is shown.
    pub fn inner(&self, path: &[u8]) -> Option<CString> {
        let root = self.root.as_os_str().as_bytes();
        CString::new([root, path].concat()).ok()
    }

    /// What `path`, which may be in the folder, stands for.
    pub fn outer<'a>(&self, path: &'a [u8]) -> Option<&'a [u8]> {
        let path = path.strip_prefix(self.root.as_os_str().as_bytes())?;
        (path.first() == Some(&b'/')).then_some(path)
    }

    /// Removes the folder.
    pub fn remove(&self) {
        // If that fails, the next process tries.
        let _ = fs::remove_dir_all(&self.root);
    }

    fn fill(&self, devices: &BTreeMap<u32, Entry>, iommus: &[Iommu]) -> io::Result<()> {
        self.folder("/dev/vfio/devices")?;
        for name in ["devices", "drivers/vfio-pci"] {
            self.folder(&format!("/sys/bus/pci/{name}"))?;
        }
        for name in ["bind", "unbind", "new_id", "remove_id"] {
            self.file(&format!("/sys/bus/pci/drivers/vfio-pci/{name}"), "")?;
        }
        self.file("/sys/bus/pci/drivers_probe", "")?;
        for area in AREAS.into_iter().filter(|area| area.starts_with("/sys/module")) {
            self.folder(area)?;
        }
        self.device("/dev/vfio/vfio")?;
        for iommu in iommus {
            let (folder, class) =
                (unit_folder(&iommu.name), format!("/sys/class/iommu/{}", iommu.name));
            self.folder(&format!("{folder}/devices"))?;
            self.link(&class, &folder)?;
        }
        for (place, (number, device)) in devices.iter().enumerate() {
            self.add(*number, device, FIRST_BAR + BAR_ROOM * place as u64)?;
        }
        Ok(())
    }

    /// Adds the device `number`, whose BARs are from `bar` on.
    fn add(&self, number: u32, device: &Entry, mut bar: u64) -> io::Result<()> {
        let rid = device.config.rid().map_err(io::Error::other)?;
        let (name, vfio) = (format!("0000:{rid}"), device_name(number));
        let folder = format!("{ROOT_BUS}0000:{:02x}/{name}", rid.bus());
        let file = |file: &str, text: String| self.file(&format!("{folder}/{file}"), text);
        let config = device.kind().config_space(device.services());
        let byte = |at: usize| config.get(at).copied().unwrap_or(0);
        let word = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
        let class = u32::from_le_bytes([byte(9), byte(10), byte(11), 0]);
        for (text, value) in
            [("vendor", 0), ("device", 2), ("subsystem_vendor", 0x2c), ("subsystem_device", 0x2e)]
        {
            file(text, format!("{:#06x}\n", word(value)))?;
        }
        self.file(&format!("{folder}/config"), &config)?;
        file("class", format!("{class:#08x}\n"))?;
        file("revision", format!("{:#04x}\n", byte(8)))?;
        file("irq", "0\n".into())?;
        file("enable", "0\n".into())?;
        file("numa_node", "-1\n".into())?;
        file("driver_override", "vfio-pci\n".into())?;
        file("uevent", uevent(&name, [word(0), word(2), word(0x2c), word(0x2e)], class))?;
        // One after the other; there is no ROM.
        let bars = device.kind().bars(device.config.dma == Dma::Edu);
        let lines = bars.into_iter().chain([0]).map(|size| match size {
            0 => [0; 3],
            _ => {
                let first = bar.next_multiple_of(size);
                bar = first + size;
                [first, bar - 1, MEMORY_BAR]
            }
        });
        let lines =
            lines.map(|[first, last, flags]| format!("{first:#018x} {last:#018x} {flags:#018x}\n"));
        file("resource", lines.collect())?;

        let unit = unit_folder(&device.config.iommu);
        let group = format!("/sys/kernel/iommu_groups/{}", device.group);
        for (link, target) in [
            (format!("/sys/bus/pci/devices/{name}"), &folder),
            (format!("/sys/bus/pci/drivers/vfio-pci/{name}"), &folder),
            (format!("{group}/devices/{name}"), &folder),
            (format!("{unit}/devices/{name}"), &folder),
            (format!("{folder}/iommu"), &unit),
            (format!("{folder}/iommu_group"), &group),
        ] {
            self.link(&link, target)?;
        }
        self.link(&format!("{folder}/driver"), "/sys/bus/pci/drivers/vfio-pci")?;
        self.link(&format!("{folder}/subsystem"), "/sys/bus/pci")?;
        self.file(&format!("{group}/type"), "DMA\n")?;

        let own = format!("{folder}/vfio-dev/{vfio}");
        let (major, minor) = Node::Device(number).device_number();
        self.file(&format!("{own}/dev"), format!("{major}:{minor}\n"))?;
        let text = format!("MAJOR={major}\nMINOR={minor}\nDEVNAME=vfio/devices/{vfio}\n");
        self.file(&format!("{own}/uevent"), text)?;
        self.link(&format!("{own}/device"), &folder)?;
        self.link(&format!("{own}/subsystem"), "/sys/class/vfio-dev")?;
        self.link(&format!("/sys/class/vfio-dev/{vfio}"), &own)?;
        self.device(&format!("/dev/vfio/devices/{vfio}"))?;
        self.device(&format!("/dev/vfio/{}", device.group))
    }

    /// The place of `path` in the folder, whose parents are there from then on.
    fn at(&self, path: &str) -> io::Result<PathBuf> {
        let place = self.root.join(path.trim_start_matches('/'));
        place.parent().map_or(Ok(()), fs::create_dir_all)?;
        Ok(place)
    }

    fn folder(&self, path: &str) -> io::Result<()> {
        fs::create_dir_all(self.at(path)?)
    }

    fn file(&self, path: &str, content: impl AsRef<[u8]>) -> io::Result<()> {
        fs::write(self.at(path)?, content)
    }

    /// Makes what stands for a character device in lists: one that nobody can open. Where these
    /// cannot be made, a file without rights.
    fn device(&self, path: &str) -> io::Result<()> {
        let place = self.at(path)?;
        match sys::make_dead_device(&place) {
            Ok(()) => Ok(()),
            // Of a group with several devices.
            Err(_) if place.exists() => Ok(()),
            Err(_) => {
                fs::OpenOptions::new().write(true).create_new(true).mode(0o0).open(place).map(drop)
            }
        }
    }

    /// Makes a link at `path` to `target`, both in `/sys`: relative, as in sysfs.
    fn link(&self, path: &str, target: &str) -> io::Result<()> {
        // Without the empty part before the first separator, "sys", and the link itself.
        let up = "../".repeat(path.split('/').count().saturating_sub(3));
        symlink(up + target.trim_start_matches("/sys/"), self.at(path)?)
    }
}

fn unit_folder(name: &str) -> String {
    format!("/sys/devices/virtual/iommu/{name}")
}

/// The file `uevent` of the PCI function at `name` with these IDs.
fn uevent(name: &str, ids: [u16; 4], class: u32) -> String {
    let [vendor, device, of_subsystem, subsystem] = ids;
    let [_, base, sub, interface] = class.to_be_bytes();
    format!(
        "DRIVER=vfio-pci\nPCI_CLASS={class:X}\nPCI_ID={vendor:04X}:{device:04X}\n\
         PCI_SUBSYS_ID={of_subsystem:04X}:{subsystem:04X}\nPCI_SLOT_NAME={name}\n\
         MODALIAS=pci:v{vendor:08X}d{device:08X}sv{of_subsystem:08X}sd{subsystem:08X}\
         bc{base:02X}sc{sub:02X}i{interface:02X}\n"
    )
}

/// Locks the folder `path` of this user, unless another process has. Anybody may have put anything
/// there: a link is not followed, and a pipe does not block.
fn lock(path: &Path) -> Option<Internal> {
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let folder = fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let folder = Internal::new(folder.into());
    let owner = sys::status(folder.raw()).ok()?.st_uid;
    (owner == sys::effective_user_id() && sys::lock(folder.raw()).is_ok()).then_some(folder)
}

/// Removes folders in `folder` of processes that are gone.
fn remove_left(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_one = entry.file_name().as_bytes().starts_with(PREFIX.as_bytes());
        if let Some(_lock) = is_one.then(|| lock(&entry.path())).flatten() {
            // What cannot be removed stays.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::world::World;
    use std::sync::Arc;

    fn made() -> Sysfs {
        let world = World::new(&Config::load(None).unwrap(), Arc::default()).unwrap();
        Sysfs::new(world.devices(), world.iommus()).unwrap()
    }

    #[test]
    fn what_is_shown() {
        for (path, shown) in [
            ("/sys/bus/pci", true),
            ("/sys/bus/pci/devices/0000:00:04.0/config", true),
            ("/sys/bus/pci_express", false),
            ("/sys/devices/pci0000:00/0000:00:04.0", true),
            ("/sys/devices/system/cpu", false),
            ("/sys/module/vfio_pci_core", false),
            ("/dev/vfio", true),
            ("/dev/vfio/devices", true),
            ("/dev/iommu", false),
            ("sys/bus/pci", false),
            ("//sys/./bus//pci/", true),
            ("/dev/vfio/../null", true),
            ("/dev/x/../vfio", false),
            ("/devices/pci0000:00", false),
        ] {
            assert_eq!(is_shown(path.as_bytes()), shown, "{path}");
        }
    }

    #[test]
    fn a_folder_is_its_process_s_until_it_ends() {
        use std::os::unix::fs::PermissionsExt;
        let sysfs = made();
        let root = sysfs.root.clone();
        assert_eq!(root.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        remove_left(root.parent().unwrap());
        assert!(root.exists(), "it is locked");
        let other = made();
        assert_ne!(other.root, root);
        other.remove();
        assert!(!other.root.exists());
        // As when the process was killed.
        drop(sysfs);
        assert!(root.exists());
        remove_left(root.parent().unwrap());
        assert!(!root.exists());
    }

    #[test]
    fn what_others_put_beside_it_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(format!("{PREFIX}{name}"));
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), kind, mode, 0).unwrap();
        let kept = tempfile::tempdir().unwrap();
        symlink(kept.path(), at("link")).unwrap();
        fs::create_dir(at("left")).unwrap();
        // Would block in the pipe for ever.
        remove_left(folder.path());
        assert!(at("link").is_symlink() && at("pipe").exists() && !at("left").exists());
    }

    #[test]
    fn a_folder_behind_a_link_is_known_by_its_real_name() {
        let real = tempfile::tempdir().unwrap();
        let beside = tempfile::tempdir().unwrap();
        let link = beside.path().join("link");
        symlink(real.path(), &link).unwrap();
        let sysfs = Sysfs::empty(&link).unwrap();
        sysfs.folder("/sys/bus/pci").unwrap();
        let inner = sysfs.inner(b"/sys/bus/pci").unwrap();
        let found = fs::canonicalize(inner.to_str().unwrap()).unwrap();
        assert_eq!(sysfs.outer(found.as_os_str().as_bytes()), Some(&b"/sys/bus/pci"[..]));
    }

    #[test]
    fn paths_without_detours() {
        let sysfs = made();
        let device = "/sys/devices/pci0000:00/0000:00:05.0";
        for (path, plain) in [
            ("//dev//vfio/./0", Some("/dev/vfio/0")),
            ("/dev/vfio/0/", Some("/dev/vfio/0/")),
            ("/dev/vfio/.", Some("/dev/vfio/")),
            ("/dev/vfio/..", Some("/dev")),
            ("/dev/vfio/../null", Some("/dev/null")),
            ("/dev/vfio/devices/../0", Some("/dev/vfio/0")),
            ("/dev/vfio/vfio/../0", None),
            ("/sys/bus/pci/../../devices/system", Some("/sys/devices/system")),
            ("/sys/bus/pci/devices/0000:00:05.0/../0000:00:05.0", Some(device)),
            ("/sys/bus/pci/none/../devices", None),
            ("/dev/vfio/../../..", Some("/")),
            ("/sys/bus/pci/../../devices/pci0000:00/x", Some("/sys/devices/pci0000:00/x")),
            ("/dev/vfio/../shm/../null", Some("/dev/shm/../null")),
            ("/tmp/../dev/vfio", Some("/tmp/../dev/vfio")),
        ] {
            let found = sysfs.plain(path.as_bytes());
            let found = found.map(|found| String::from_utf8(found).unwrap());
            assert_eq!(found.as_deref(), plain, "{path}");
        }
        sysfs.remove();
    }

    #[test]
    fn what_stands_for_a_device_cannot_be_opened() {
        let sysfs = made();
        let inner = sysfs.inner(b"/dev/vfio/devices/vfio1").unwrap();
        sysfs.device("/dev/vfio/devices/vfio1").expect("as for a group with several devices");
        let refused = fs::File::open(inner.to_str().unwrap());
        assert!(refused.is_err(), "{refused:?}");
        sysfs.remove();
    }

    #[test]
    fn links_lead_to_what_is_shown() {
        let sysfs = made();
        let leads = |path: &str| {
            let inner = sysfs.inner(path.as_bytes()).unwrap();
            let real = fs::canonicalize(inner.to_str().unwrap()).unwrap();
            String::from_utf8(sysfs.outer(real.as_os_str().as_bytes()).unwrap().to_vec()).unwrap()
        };
        let device = "/sys/devices/pci0000:00/0000:00:05.0";
        let short = "/sys/bus/pci/devices/0000:00:05.0";
        for (link, target) in [
            (short.to_owned(), device.to_owned()),
            (format!("{short}/iommu_group"), "/sys/kernel/iommu_groups/1".to_owned()),
            (format!("{short}/iommu_group/devices/0000:00:05.0"), device.to_owned()),
            (format!("{short}/iommu/devices/0000:00:05.0"), device.to_owned()),
            (format!("{short}/driver/0000:00:05.0"), device.to_owned()),
            (format!("{short}/subsystem/devices/0000:00:05.0"), device.to_owned()),
            ("/sys/class/vfio-dev/vfio1/device".to_owned(), device.to_owned()),
            ("/sys/class/iommu/dmar0".to_owned(), unit_folder("dmar0")),
        ] {
            assert_eq!(leads(&link), target, "{link}");
        }
        assert_eq!(sysfs.outer(b"/sys/bus/pci"), None);
        sysfs.remove();
    }
}
