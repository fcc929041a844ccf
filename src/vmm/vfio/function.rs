// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An assigned device as a PCI function of the guest.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use super::bars::{memory_bars, DeviceBar, LentBars};
use super::config_image::{Behind, ConfigImage, LiveRange};
use super::host_device::{HostDevice, Irq, Region};
use super::interrupts::{DeviceInterrupts, DeviceMsix, Intx, Msi};
use super::mapping::Lender;
use super::msix_structures::{MsixPart, MsixStructures};
use super::vectors::{MakeVector, TableVector, Vectors};
use super::{services, VfioError, VfioProblem};
use crate::devices::{HostServices, ServiceCapabilities, ServiceListener};
use crate::pci::layout::{
    Command, BARS, COMMAND, CONFIG_SIZE, EXPRESS_INITIATE_FLR, INTERRUPT_LINE, INTERRUPT_PIN,
    STATUS, STATUS_CAPABILITIES,
};
use crate::pci::{
    make_endpoint, BarPlacement, ConfigSpace, EventLine, InterruptVector, Msix, MsixCapability,
    PciFunction, Way,
};
use crate::Result;
use twostage::ratelimit::RateLimit;

/// All of configuration space.
const ALL: Range<u16> = 0..CONFIG_SIZE as u16;

/// The machine around an assigned device.
pub struct Surroundings<'a> {
    /// The bridge that it is behind.
    pub way: Option<Arc<Way>>,
    /// Allocates an address on the bus for a BAR of so many bytes, aligned to its size.
    pub place: &'a mut dyn FnMut(u64) -> Result<u64>,
    /// Maps memory of this process into the guest.
    pub lender: Arc<dyn Lender>,
    /// Makes vectors.
    pub vectors: Arc<MakeVector>,
    /// The line of INTA, and its input of the PIC.
    pub line: &'a mut dyn FnMut() -> Result<(u8, Box<dyn EventLine>)>,
    /// The services that the guest may be offered of it.
    pub services: HostServices,
    /// What to tell those that it has enabled.
    pub enabled: ServiceListener,
    /// The host's page size.
    pub page: u64,
    /// Whether a BAR is where it decodes.
    pub answers: fn(&BarPlacement) -> bool,
}

/// The function. Dropping it stops and resets the device.
///
/// Lock order: `applying`; configuration space, which is not held during calls to the host; the
/// MSI-X table; vectors.
pub struct VfioPci {
    /// For log lines.
    name: String,
    host: Arc<dyn HostDevice>,
    config_region: Region,
    config: Mutex<ConfigSpace>,
    /// Held while configuration space is applied to the device.
    applying: Mutex<()>,
    /// The state after reset.
    pristine: ConfigSpace,
    live: Vec<LiveRange>,
    device_control: Option<u16>,
    services: ServiceCapabilities,
    enabled: ServiceListener,
    regions: [Option<Region>; BARS],
    lent: LentBars,
    answers: fn(&BarPlacement) -> bool,
    msix: Option<MsixStructures>,
    interrupts: DeviceInterrupts,
    complaints: RateLimit,
}

impl fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("page", &self.page).finish_non_exhaustive()
    }
}

impl VfioPci {
    /// The function for `host`, after a reset. `name` is for users and log lines.
    ///
    /// # Errors
    /// It cannot be assigned; or VFIO or KVM refuse what it needs.
    pub fn new(name: String, host: Arc<dyn HostDevice>, around: Surroundings<'_>) -> Result<Self> {
        let problem = |problem: VfioProblem| VfioError::new(&name, problem);
        let asking =
            |source| problem(VfioProblem::Call { what: "querying its description", source });
        if !host.can_reset() {
            log::warn!("--vfio {name}: it cannot be reset, and may continue what it did before");
        } else if let Err(error) = host.reset() {
            log::warn!("--vfio {name}: reset: {error}; it may continue what it did before");
        }

        let config_region = host.region(VFIO_PCI_CONFIG_REGION_INDEX).map_err(asking)?;
        let device = read_config(&*host, &config_region).map_err(asking)?;
        let vectors = |irq| match host.irq(irq) {
            Ok(info) => Ok(info.count),
            // A host driver may know no such kind, and say so with an error.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
                log::warn!("--vfio {name}: {irq:?}: {error}; the guest has none of them");
                Ok(0)
            }
            Err(error) => Err(asking(error)),
        };
        let bars = memory_bars(&*host, &device).map_err(asking)?;
        // The pin is in the header, the first 64 bytes of every configuration space.
        let intx = vectors(Irq::Intx)? > 0 && device[usize::from(INTERRUPT_PIN)] != 0;
        let behind = Behind {
            intx,
            reset: host.can_reset(),
            msi: vectors(Irq::Msi)?,
            msix: vectors(Irq::Msix)?,
            bars: &bars,
        };
        let image = ConfigImage::new(&device, &behind)
            .map_err(|error| problem(VfioProblem::Config(error)))?;
        let ConfigImage { mut config, live, msi, msix, express, device_control, extension, .. } =
            image;
        if msix.is_some() && image.msix_vectors.is_none() {
            log::warn!(
                "--vfio {name}: the guest does not see its MSI-X: its table lies in no BAR, its \
                 pending bits lie in none and have no room behind it, its capability runs into the \
                 next one, or VFIO has no vectors for it"
            );
        }
        let services = services::add(&mut config, extension, &device, around.services);
        if let Some(way) = &around.way {
            if let Some(express) = express {
                // It is not on the root bus, for which the image is made: it has a link.
                make_endpoint(&mut config, express);
            }
            config.behind(Some(way.clone()));
        }

        for DeviceBar { index, bar, .. } in &bars {
            config.add_memory_bar(*index, *bar, (around.place)(bar.size)?);
        }

        let intx = match intx {
            true => {
                let (line, wires) = (around.line)()?;
                config.set_u8(INTERRUPT_LINE, line);
                Some(Intx::new(host.clone(), wires))
            }
            false => None,
        };
        let messages = |irq, count| {
            let info = host.irq(irq).map_err(asking)?;
            Result::Ok(Vectors::new(host.clone(), irq, info, count, around.vectors.clone()))
        };
        let msi = match msi {
            Some(offset) => Some(Msi { offset, vectors: messages(Irq::Msi, 32)? }),
            None => None,
        };
        let table = match (msix, image.msix_vectors) {
            (Some(MsixStructures { offset, .. }), Some(vectors)) => {
                Some(device_msix(offset, vectors, messages(Irq::Msix, vectors.into())?))
            }
            _ => None,
        };

        let trapped = |bar| msix.map_or_else(Vec::new, |msix| msix.in_bar(bar));
        let lent = LentBars::new(&*host, &bars, &trapped, around.page, around.lender);
        let mut regions = [const { None }; BARS];
        for DeviceBar { index, region, .. } in bars {
            if let Some(place) = regions.get_mut(index) {
                *place = Some(region);
            }
        }
        // A reset disables the BARs.
        let mut pristine = config.clone();
        pristine.set_u16(COMMAND, Command::new().into_bits());
        let function = Self {
            name,
            host,
            config_region,
            pristine,
            config: Mutex::new(config),
            applying: Mutex::new(()),
            live,
            device_control,
            services,
            enabled: around.enabled,
            regions,
            lent,
            answers: around.answers,
            msix,
            interrupts: DeviceInterrupts::new(intx, msi, table),
            complaints: RateLimit::default(),
        };
        function.apply(&ALL);
        Ok(function)
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock()
    }

    /// Applies configuration space, of which `written` may have changed, to the device, the guest's
    /// memory and the interrupts.
    fn apply(&self, written: &Range<u16>) {
        // Of two concurrent vCPUs, the later one applies what both wrote.
        let turn = self.applying.lock();
        self.apply_in(&turn, written);
    }

    /// The same, in the turn of the caller.
    fn apply_in(&self, _turn: &MutexGuard<'_, ()>, written: &Range<u16>) {
        let config = self.space().clone();
        let mut placements = config.bar_placements();
        placements.retain(self.answers);
        // The device's memory is disabled only after unmapping it from the guest, and enabled
        // before mapping it: an access in between would fault.
        if !config.command().memory_space() {
            self.lent.update(&placements);
        }
        if !overlap(written, &(COMMAND..COMMAND + 2)).is_empty() {
            // What bridges on the way do not forward, the device must not request.
            let command = config.command().with_bus_master(config.may_request());
            self.forward(COMMAND, &command.into_bits().to_le_bytes());
        }
        self.lent.update(&placements);
        self.interrupts.update(&config);
        (self.enabled)(self.services.enabled(&config));
    }

    /// Resets the function on the guest's request.
    fn reset(&self) {
        // What another vCPU writes to configuration space meanwhile is applied afterwards, and so
        // not at all.
        let turn = self.applying.lock();
        self.interrupts.disable();
        self.lent.update(&[]);
        if let Err(error) = self.host.reset() {
            self.complaints.warn(format_args!("--vfio {}: reset: {error}", self.name));
        }
        // Only now, as what another one writes to the table is lost, too.
        self.interrupts.forget_messages();
        *self.space() = self.pristine.clone();
        self.apply_in(&turn, &ALL);
    }

    /// Writes to the device's own configuration space.
    fn forward(&self, offset: u16, data: &[u8]) {
        if let Err(error) = self.host.write(&self.config_region, offset.into(), data) {
            self.complaints
                .warn(format_args!("--vfio {}: configuration {offset:#x}: {error}", self.name));
        }
    }

    /// Whether the guest has just requested a reset.
    fn takes_reset(&self, written: &Range<u16>) -> bool {
        let Some(control) = self.device_control else { return false };
        // In the upper byte.
        written.contains(&(control + 1)) && self.space().u16(control) & EXPRESS_INITIATE_FLR != 0
    }

    /// What of the MSI-X structures an access to `length` bytes at `offset` of `bar` reaches, and
    /// the table, if the guest has one.
    fn msix_at(&self, bar: usize, offset: u64, length: usize) -> Option<(MsixPart, Option<&Msix>)> {
        let part = self.msix?.reached(bar, offset, length)?;
        Some((part, self.interrupts.msix.as_ref().map(|msix| &msix.table)))
    }
}

impl PciFunction for VfioPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn config_reading(&self, offset: u16, length: usize) {
        let read = range(offset, length);
        for live in &self.live {
            let bytes = overlap(&live.bytes, &read);
            let mut data = vec![0; bytes.len()];
            // If the read fails, the bytes stay as they were.
            if !bytes.is_empty()
                && self.host.read(&self.config_region, bytes.start.into(), &mut data).is_ok()
            {
                let mut config = self.space();
                let capabilities = config.u16(STATUS) & STATUS_CAPABILITIES;
                bytes.zip(data).for_each(|(offset, byte)| config.set_u8(offset, byte));
                // There is a list if any capability is left.
                let status = config.u16(STATUS) & !STATUS_CAPABILITIES | capabilities;
                config.set_u16(STATUS, status);
            }
        }
        if let Some(msi) = &self.interrupts.msi {
            msi.show_pending(&mut self.space(), &read);
        }
    }

    fn config_written(&self, offset: u16, length: usize) -> bool {
        let written = range(offset, length);
        if self.takes_reset(&written) {
            self.reset();
            return true;
        }
        self.services.written(&mut self.space());
        for live in self.live.iter().filter(|live| live.forwarded) {
            let bytes = overlap(&live.bytes, &written);
            if !bytes.is_empty() {
                let mut data = vec![0; bytes.len()];
                self.space().read(bytes.start, &mut data);
                self.forward(bytes.start, &data);
            }
        }
        self.apply(&written);
        false
    }

    fn reset(&self) {
        VfioPci::reset(self);
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        match self.msix_at(bar, offset, data.len()) {
            Some((MsixPart::Table(offset), Some(table))) => return table.read_table(offset, data),
            Some((MsixPart::Pending(offset), Some(table))) => {
                return table.read_pending(offset, data);
            }
            // The device's own structures, which the host uses.
            Some(_) => return data.fill(0xff),
            None => {}
        }
        let region = self.regions.get(bar).and_then(Option::as_ref);
        let read = region.map(|region| self.host.read(region, offset, data));
        // As from a device that does not answer.
        if !matches!(read, Some(Ok(()))) {
            data.fill(0xff);
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        match self.msix_at(bar, offset, data.len()) {
            Some((MsixPart::Table(offset), Some(table))) => return table.write_table(offset, data),
            Some(_) => return,
            None => {}
        }
        let Some(region) = self.regions.get(bar).and_then(Option::as_ref) else { return };
        if let Err(error) = self.host.write(region, offset, data) {
            self.complaints
                .warn(format_args!("--vfio {}: BAR {bar} at {offset:#x}: {error}", self.name));
        }
    }
}

impl Drop for VfioPci {
    /// The guest is gone: nothing of the device has any effect any more.
    fn drop(&mut self) {
        self.interrupts.disable();
        self.lent.update(&[]);
        self.forward(COMMAND, &Command::new().into_bits().to_le_bytes());
        if self.host.can_reset() {
            if let Err(error) = self.host.reset() {
                log::warn!("--vfio {}: reset: {error}; it may continue what it did", self.name);
            }
        }
    }
}

impl fmt::Debug for VfioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioPci")
            .field("name", &self.name)
            .field("lent", &self.lent)
            .field("interrupts", &self.interrupts)
            .finish_non_exhaustive()
    }
}

/// The device's configuration space. Without extended configuration space, that reads as zeroes.
fn read_config(host: &dyn HostDevice, region: &Region) -> std::io::Result<Box<[u8; CONFIG_SIZE]>> {
    let mut bytes = Box::new([0; CONFIG_SIZE]);
    let length = region.size.min(CONFIG_SIZE as u64) as usize;
    // No more than fits.
    host.read(region, 0, &mut bytes[..length])?;
    Ok(bytes)
}

/// MSI-X of so many vectors, which are `vectors`, with the capability at `offset`.
fn device_msix(offset: u16, count: u16, vectors: Vectors) -> DeviceMsix {
    let vectors = Arc::new(vectors);
    let sender = |number| {
        Arc::new(TableVector { vectors: vectors.clone(), number }) as Arc<dyn InterruptVector>
    };
    let table = Msix::new((0..count.into()).map(sender).collect());
    DeviceMsix { capability: MsixCapability::at(offset), table, vectors }
}

/// The bytes of an access to configuration space.
fn range(offset: u16, length: usize) -> Range<u16> {
    // An access has at most eight bytes.
    offset..offset.saturating_add(length as u16)
}

fn overlap(one: &Range<u16>, other: &Range<u16>) -> Range<u16> {
    one.start.max(other.start)..one.end.min(other.end)
}
