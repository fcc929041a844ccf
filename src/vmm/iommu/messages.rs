// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interrupt messages of devices behind a virtual SMMUv3.
//!
//! To an SMMU a message is a write like any other: the stream's entry and stage 1 say where it
//! goes, and only a write that ends at the doorbell of the interrupt controller interrupts. Here
//! each message is translated anew, so that nobody has to be told when the guest invalidates.
//! Translations to the doorbell are not cached (an SMMU may cache them, but need not), so a guest
//! that forgets to invalidate one is not found out. Context descriptors are cached.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use twostage::sync::Mutex;

use super::plan::{attributes, refusal};
use crate::arch::layout::MESSAGE_RANGE;
use crate::devices::{DmaError, DmaMaster, ServiceControl, Services};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::viommu::{InterruptRemapper, InterruptSink, MsiMessage};
use twostage_emulated::{DmaError as Refusal, DmaPort};

/// GITS_TRANSLATER: at 0x40 in the page to interrupt.
pub(super) const DOORBELL: u64 = *MESSAGE_RANGE.start() + 0x40;

/// Sends `data` to the interrupt controller if `address`, which is in the page to interrupt, is the
/// doorbell. The rest of the page ignores writes.
fn deliver(address: u64, data: u32, sink: &dyn InterruptSink) {
    if address == DOORBELL {
        sink.send_msi(address, data);
    }
}

/// The messages of the devices behind one virtual SMMU.
///
/// Those of a device of this process are writes through the emulated SMMU. The kernel and the
/// physical SMMU see to the address of a physical device's, so the one that the guest gave the
/// device is not the one on the bus: a message that arrives here has passed the SMMU already.
pub(super) struct DeviceMessages {
    /// Of a device of this process, its port.
    ports: BTreeMap<Bdf, Option<Mutex<DmaPort>>>,
}

impl DeviceMessages {
    /// Those of the devices that have `ports`, and of the physical ones, which have none.
    pub fn new(ports: impl IntoIterator<Item = (Bdf, Option<DmaPort>)>) -> Self {
        let ports = ports.into_iter().map(|(bdf, port)| (bdf, port.map(Mutex::new)));
        Self { ports: ports.collect() }
    }
}

impl InterruptRemapper for DeviceMessages {
    /// A message that the tables lead to memory is written there; that counts as sent.
    fn send_remapped(&self, source: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        let MsiMessage { address, data } = message;
        let mut port = match self.ports.get(&source) {
            Some(Some(port)) => port.lock(),
            Some(None) => {
                sink.send_msi(DOORBELL, data);
                return true;
            }
            None => return false,
        };
        port.write_message(attributes(None), address, data, |address| deliver(address, data, sink))
            .inspect_err(|refusal| log::debug!("message of {source}: {refusal}"))
            .is_ok()
    }

    /// Never a result that could be kept of one that is translated here: at the next message the
    /// guest's tables may differ.
    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage> {
        let arrived = matches!(self.ports.get(&source), Some(None));
        arrived.then_some(MsiMessage { address: DOORBELL, ..message })
    }
}

impl fmt::Debug for DeviceMessages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.ports.keys()).finish()
    }
}

/// The memory requests of a device of this process, of which a write may be a message.
pub(super) struct SmmuDma {
    pub port: DmaPort,
    /// Where translated messages go.
    pub messages: Arc<dyn InterruptSink>,
    /// The device asks for translations (ATS).
    pub asks: bool,
    /// Its requests for memory can be stalled.
    pub stalls: bool,
}

impl DmaMaster for SmmuDma {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        DmaMaster::read(&mut self.port, pasid, iova, data)
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        let Self { port, messages, asks, stalls } = self;
        let word = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        // Only aligned writes of four bytes interrupt.
        let Some(word) = word.ok().filter(|_| iova.is_multiple_of(4)) else {
            return DmaMaster::write(port, pasid, iova, data);
        };
        if *asks || *stalls {
            // A device that asks for translations gets memory's; messages it sends untranslated.
            // One that is stalled is so by what does not lead to memory, nor to messages.
            match DmaPort::write(port, attributes(pasid), iova, data) {
                Err(Refusal::Interrupt { .. }) => {}
                result => return result.map_err(|error| refusal(iova, &error)),
            }
        }
        port.write_message(attributes(pasid), iova, word, |address| {
            deliver(address, word, &**messages);
        })
        .map_err(|_: Refusal| DmaError::at(iova))
    }

    fn set_services(&mut self, services: Services) {
        self.asks = services.ats;
        DmaMaster::set_services(&mut self.port, services);
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        DmaMaster::service_control(&self.port)
    }
}

#[cfg(test)]
mod tests {

    use vm_memory::{Bytes, GuestAddress};

    use super::super::tests::{iommus_with, FUNCTION};
    use super::super::{Iommu, Iommus};
    use super::*;
    use crate::config::SmmuV3Options;
    use crate::memory::MachineMemory;
    use twostage::patience::wait_until;
    use twostage::spec::smmuv3::command::{AddressRange, Command};
    use twostage::spec::smmuv3::context::{Cd, Cd0, Cd1};
    use twostage::spec::smmuv3::event::{EventId, EventRecord};
    use twostage::spec::smmuv3::queue::QueueBase;
    use twostage::spec::smmuv3::regs::{self, Cr0, StrtabBase, StrtabBaseCfg};
    use twostage::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig, STE_SIZE};
    use twostage::spec::smmuv3::translation::{Descriptor, Granule};
    use twostage::spec::smmuv3::StreamId;

    /// What the interrupt controller got: (address, data).
    #[derive(Default)]
    struct Arrived(Mutex<Vec<(u64, u32)>>);

    impl InterruptSink for Arrived {
        fn send_msi(&self, address: u64, data: u32) {
            self.0.lock().push((address, data));
        }
    }

    /// Where the guest has its tables and queues: pages from the start of memory.
    const STREAMS: u64 = 0x1000;
    const CONTEXT: u64 = 0x2000;
    const LEVEL_2: u64 = 0x3000;
    const LEVEL_3: u64 = 0x4000;
    const COMMANDS: u64 = 0x5000;
    const EVENTS: u64 = 0x6000;
    const PAGE: u64 = 0x7000;
    const QUEUE_BITS: u8 = 7;
    const ASID: u16 = 3;
    /// Where the function is told to write its messages, and the page.
    const IOVA: u64 = 0x1230_0000;
    const MESSAGE: MsiMessage = MsiMessage { address: IOVA + 0x40, data: 7 };

    /// A machine with an SMMU in front of one function, and the guest's driver.
    struct Guest {
        memory: MachineMemory,
        iommus: Iommus,
        arrived: Arc<Arrived>,
        /// The function's entry allows translation requests.
        ats: bool,
        submitted: u32,
        seen: u32,
    }

    impl Guest {
        fn new() -> Self {
            Self::with(SmmuV3Options::default())
        }

        fn with(options: SmmuV3Options) -> Self {
            let memory = MachineMemory::new(1 << 20).unwrap();
            let arrived = Arc::<Arrived>::default();
            let sink = arrived.clone();
            let messages = move |_| -> Arc<dyn InterruptSink> { sink.clone() };
            let ats = options.ats;
            let iommus = iommus_with(&[options.into()], &[FUNCTION], &memory, &messages).unwrap();
            Self { memory, iommus, arrived, ats, submitted: 0, seen: 0 }
        }

        fn iommu(&self) -> &Iommu {
            &self.iommus.all()[0]
        }

        /// The GPA of what is at `offset` in memory.
        fn gpa(&self, offset: u64) -> u64 {
            self.memory.start_of(&self.memory.regions()[0]) + offset
        }

        fn store(&self, offset: u64, word: u64) {
            self.memory.map().write_obj(word, GuestAddress(self.gpa(offset))).unwrap();
        }

        fn load(&self, offset: u64) -> u64 {
            self.memory.map().read_obj(GuestAddress(self.gpa(offset))).unwrap()
        }

        fn write32(&self, offset: u64, value: u32) {
            self.iommu().model.registers().write(offset, &value.to_le_bytes());
        }

        fn write64(&self, offset: u64, value: u64) {
            self.iommu().model.registers().write(offset, &value.to_le_bytes());
        }

        /// Translation is on, and the function's entry is of `config`.
        fn enable(&mut self, config: StreamConfig) {
            self.set(config);
            let strtab = StrtabBase::new().with_addr(self.gpa(STREAMS) >> 6);
            self.write64(regs::STRTAB_BASE, strtab.into_bits());
            self.write32(regs::STRTAB_BASE_CFG, StrtabBaseCfg::new().with_log2size(6).into_bits());
            let queue = |at| QueueBase::new().with_log2size(QUEUE_BITS).with_addr(at >> 5);
            self.write64(regs::CMDQ_BASE, queue(self.gpa(COMMANDS)).into_bits());
            self.write64(regs::EVENTQ_BASE, queue(self.gpa(EVENTS)).into_bits());
            let cr0 = Cr0::new().with_smmuen(true).with_cmdqen(true).with_eventqen(true);
            self.write32(regs::CR0, cr0.into_bits());
        }

        /// The function's entry is of `config`; stage 1 has tables of two levels, of 30 bits.
        fn set(&self, config: StreamConfig) {
            let ste = Ste0::new().with_v(true).with_config(config.into_bits());
            let ste = ste.with_s1contextptr(self.gpa(CONTEXT) >> 6);
            let at = STREAMS + u64::from(FUNCTION.bdf.raw()) * STE_SIZE;
            let attributes = Ste1::new().with_shcfg(1).with_eats(self.ats.into());
            self.store(at + 8, attributes.into_bits());
            self.store(at, ste.into_bits());
            let qw0 = Cd0::new().with_t0sz(34).with_tg0(Granule::K4.tg0()).with_epd1(true);
            let qw0 = qw0.with_v(true).with_ips(5).with_aa64(true).with_r(true).with_a(true);
            let qw0 = qw0.with_aset(true).with_asid(ASID);
            let qw1 = Cd1::new().with_ttb0(self.gpa(LEVEL_2) >> 4);
            let cd = Cd { qw0, qw1, mair: 0xff, ..Cd::default() };
            for (word, value) in (CONTEXT..).step_by(8).zip(cd.to_words()) {
                self.store(word, value);
            }
            let table = Descriptor::new().with_valid(true).with_table(true);
            let table = table.with_address(Granule::K4, self.gpa(LEVEL_3));
            self.store(LEVEL_2 + (IOVA >> 21) * 8, table.into_bits());
        }

        /// Stage 1 leads the page of messages to `gpa`, or nowhere; the unit is not told.
        fn map(&self, gpa: Option<u64>) {
            let leaf = Descriptor::new().with_valid(true).with_table(true).with_af(true);
            let leaf = leaf.with_ng(true).with_ap_unprivileged(true);
            let leaf = gpa.map_or(0, |gpa| leaf.with_address(Granule::K4, gpa).into_bits());
            self.store(LEVEL_3 + (IOVA >> 12 & 0x1ff) * 8, leaf);
        }

        /// The unit does `command`.
        fn submit(&mut self, command: Command) {
            let at = COMMANDS + u64::from(self.submitted) * 16;
            let [low, high] = command.encode();
            self.store(at, low);
            self.store(at + 8, high);
            self.submitted += 1;
            self.write32(regs::CMDQ_PROD, self.submitted);
            assert_eq!(self.read32(regs::CMDQ_CONS), self.submitted);
        }

        fn read32(&self, offset: u64) -> u32 {
            let mut bytes = [0; 4];
            self.iommu().model.registers().read(offset, &mut bytes);
            u32::from_le_bytes(bytes)
        }

        /// Sends `message` from the function; whether it was remapped and delivered.
        fn interrupt(&self, message: MsiMessage) -> bool {
            let remapper = self.iommu().model.interrupt_remapper().unwrap().upgrade().unwrap();
            assert_eq!(remapper.translate(FUNCTION.bdf, message), None, "nobody may keep it");
            remapper.send_remapped(FUNCTION.bdf, message, &*self.arrived)
        }

        /// What arrived since the last time.
        fn arrived(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut *self.arrived.0.lock())
        }

        /// The next event, which another thread brings.
        fn event(&mut self) -> EventRecord {
            wait_until("an event", || self.read32(regs::EVENTQ_PROD) != self.seen);
            let at = EVENTS + u64::from(self.seen) * 32;
            self.seen += 1;
            EventRecord::from_words([0, 8, 16, 24].map(|word| self.load(at + word)))
        }
    }

    #[test]
    fn a_message_goes_where_the_function_is_told_until_translation_is_enabled() {
        let guest = Guest::new();
        assert!(guest.interrupt(MsiMessage { address: DOORBELL, data: 7 }));
        assert_eq!(guest.arrived(), [(DOORBELL, 7)]);
        // The rest of the page interrupts nobody.
        guest.interrupt(MsiMessage { address: DOORBELL + 4, data: 7 });
        // What is no doorbell is memory, or nothing.
        assert!(guest.interrupt(MsiMessage { address: guest.gpa(PAGE), data: 8 }));
        assert!(!guest.interrupt(MsiMessage { address: 1 << 40, data: 9 }));
        assert_eq!((guest.arrived(), guest.load(PAGE)), (vec![], 8));
    }

    #[test]
    fn a_stream_that_aborts_does_not_interrupt_and_one_that_bypasses_does() {
        let mut guest = Guest::new();
        guest.enable(StreamConfig::Abort);
        let message = MsiMessage { address: DOORBELL, data: 7 };
        assert!(!guest.interrupt(message));
        guest.set(StreamConfig::Bypass);
        assert!(!guest.interrupt(message), "the unit was not told");
        let stream = StreamId::from(FUNCTION.bdf);
        guest.submit(Command::CfgiSte { stream, leaf: true });
        assert!(guest.interrupt(message));
        assert_eq!(guest.arrived(), [(DOORBELL, 7)]);
        assert_eq!(guest.read32(regs::EVENTQ_PROD), 0, "to abort is no event");
    }

    #[test]
    fn stage_1_says_where_a_message_goes() {
        let mut guest = Guest::new();
        guest.enable(StreamConfig::Stage1);
        assert!(!guest.interrupt(MESSAGE));
        let event = guest.event();
        assert_eq!(event.id(), Some(EventId::Translation));
        assert_eq!(
            (event.stream(), event.input_address),
            (FUNCTION.bdf.into(), MESSAGE.address),
            "the event names it as that of a DMA"
        );
        assert!(!event.qw1.rnw());

        guest.map(Some(DOORBELL & !0xfff));
        assert!(guest.interrupt(MESSAGE));
        assert_eq!(guest.arrived(), [(DOORBELL, 7)]);
        // The doorbell's own address means nothing.
        assert!(!guest.interrupt(MsiMessage { address: DOORBELL & 0x3fff_ffff, data: 7 }));
        assert_eq!(guest.event().input_address, DOORBELL & 0x3fff_ffff);

        // To memory it is a write to memory.
        guest.map(Some(guest.gpa(PAGE)));
        let range = AddressRange::at(IOVA);
        guest.submit(Command::TlbiNhVa { vmid: 0, asid: ASID, range });
        assert!(guest.interrupt(MESSAGE));
        assert_eq!((guest.arrived(), guest.load(PAGE + 0x40)), (vec![], 7));

        guest.map(None);
        guest.submit(Command::TlbiNhVa { vmid: 0, asid: ASID, range });
        assert!(!guest.interrupt(MESSAGE));
        assert_eq!(guest.event().id(), Some(EventId::Translation));
        assert_eq!(guest.arrived(), []);
    }

    #[test]
    fn a_dma_that_ends_at_the_doorbell_interrupts_whether_the_device_has_a_tlb_or_not() {
        for (ats, eats) in [(false, false), (true, true), (true, false)] {
            let mut guest = Guest::with(SmmuV3Options { ats, ..SmmuV3Options::default() });
            guest.ats = eats;
            guest.enable(StreamConfig::Stage1);
            let nowhere: Arc<dyn InterruptSink> = Arc::new(Arrived::default());
            let mut dma = guest.iommu().dma_master(FUNCTION.bdf, nowhere).unwrap();
            let services = Services { ats, ..Services::default() };
            dma.service_control().unwrap().enabled(services);
            dma.set_services(services);
            let mut write = |word: u32| dma.write(None, MESSAGE.address, &word.to_le_bytes());
            guest.map(Some(DOORBELL & !0xfff));
            write(9).unwrap();
            assert_eq!(guest.arrived(), [(DOORBELL, 9)]);
            guest.map(Some(guest.gpa(PAGE)));
            write(10).unwrap();
            assert_eq!((guest.arrived(), guest.load(PAGE + 0x40)), (vec![], 10));
            // A device with a TLB uses what it has, which is nothing without EATS.
            guest.map(None);
            let range = AddressRange::at(IOVA);
            guest.submit(Command::TlbiNhVa { vmid: 0, asid: ASID, range });
            assert_eq!(write(11).is_ok(), eats);
            assert_eq!(guest.load(PAGE + 0x40), if eats { 11 } else { 10 });
            // No message has another length, or is read.
            guest.map(Some(DOORBELL & !0xfff));
            let stream = FUNCTION.bdf.into();
            let (substream, global, address, size) = (None, false, 0, 52);
            if ats {
                guest.submit(Command::AtcInv { stream, substream, global, address, size });
            }
            dma.write(None, MESSAGE.address, &[0; 8]).unwrap_err();
            dma.read(None, MESSAGE.address, &mut [0; 4]).unwrap_err();
        }
    }

    #[test]
    fn a_function_that_is_not_there_does_not_interrupt() {
        let guest = Guest::new();
        let remapper = guest.iommu().model.interrupt_remapper().unwrap().upgrade().unwrap();
        let message = MsiMessage { address: DOORBELL, data: 7 };
        assert!(!remapper.send_remapped(Bdf::from_raw(0x99), message, &*guest.arrived));
        assert_eq!(guest.arrived(), []);
    }

    #[test]
    fn messages_of_a_device_of_this_machine_have_arrived() {
        let (arrived, messages) = (Arrived::default(), DeviceMessages::new([(FUNCTION.bdf, None)]));
        assert!(messages.send_remapped(FUNCTION.bdf, MESSAGE, &arrived));
        assert_eq!(*arrived.0.lock(), [(DOORBELL, 7)]);
        let kept = messages.translate(FUNCTION.bdf, MESSAGE);
        assert_eq!(kept, Some(MsiMessage { address: DOORBELL, data: 7 }));
        let other = Bdf::from_raw(0x99);
        assert!(!messages.send_remapped(other, MESSAGE, &arrived));
        assert_eq!(messages.translate(other, MESSAGE), None);
    }
}
