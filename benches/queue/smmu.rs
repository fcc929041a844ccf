// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual SMMUv3 with a command queue, on a host that does nothing.

use std::sync::Arc;

use twostage::spec::smmuv3::command::{AddressRange, Command, SyncSignal};
use twostage::spec::smmuv3::regs;
use twostage::spec::smmuv3::StreamId;
use twostage::viommu::smmuv3::{
    Smmu, SmmuConfig, SmmuHostSide, SmmuInterrupt, SmmuInterrupts, SmmuInvalidateError,
    StreamPolicy,
};
use twostage::viommu::HostSideError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The command queue's address, and the binary logarithm of its number of entries.
const QUEUE: u64 = 0x1_0000;
const LOG2SIZE: u64 = 8;
/// Indices have one more bit: the wrap.
const INDICES: u64 = (2 << LOG2SIZE) - 1;
const ENTRIES: u64 = (1 << LOG2SIZE) - 1;

#[derive(Debug)]
struct Idle;

impl SmmuHostSide for Idle {
    fn configure(&self, _: StreamId, _: &StreamPolicy) -> Result<(), HostSideError> {
        Ok(())
    }

    fn invalidate(&self, _: &[Command]) -> Result<(), SmmuInvalidateError> {
        Ok(())
    }
}

impl SmmuInterrupts for Idle {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, _: SmmuInterrupt) {}
}

/// The SMMU, and the guest that drives it.
pub struct Machine {
    memory: GuestMemoryMmap,
    smmu: Arc<Smmu>,
}

impl Machine {
    /// With the queue enabled.
    pub fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let idle = Arc::new(Idle);
        let config = SmmuConfig::default();
        let smmu = Smmu::new(&config, Arc::new(memory.clone()), idle.clone(), idle, None).unwrap();
        smmu.add_stream(StreamId(8));
        smmu.mmio_write(regs::CMDQ_BASE, &(QUEUE | LOG2SIZE).to_le_bytes());
        smmu.mmio_write(regs::CR0, &(1u32 << 3).to_le_bytes());
        Self { memory, smmu }
    }

    /// Invalidates `pages` pages, and waits for CMDQ_CONS.
    pub fn invalidate(&self, pages: u64) {
        let mut prod = u64::from(self.read(regs::CMDQ_PROD));
        let mut push = |command: Command| {
            let place = GuestAddress(QUEUE + 16 * (prod & ENTRIES));
            self.memory.write_obj(command.encode(), place).unwrap();
            prod = (prod + 1) & INDICES;
        };
        for page in 0..pages {
            push(Command::TlbiNhVa { vmid: 0, asid: 1, range: AddressRange::at(page << 12) });
        }
        push(Command::Sync { signal: SyncSignal::None });
        self.smmu.mmio_write(regs::CMDQ_PROD, &(prod as u32).to_le_bytes());
        assert_eq!(u64::from(self.read(regs::CMDQ_CONS)), prod);
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.smmu.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}
