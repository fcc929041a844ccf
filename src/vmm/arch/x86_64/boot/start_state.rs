// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The first vCPU's initial state: 32-bit protected mode, flat segments, paging disabled.
//!
//! PVH, Multiboot and Linux's 32-bit protocol differ only in a few registers. Linux's also needs
//! the segment descriptors in memory.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::MachineMemory;

/// CR0.PE: protected mode.
const CR0_PE: u64 = 1 << 0;
/// CR0.ET: fixed to 1 on every processor that has KVM.
const CR0_ET: u64 = 1 << 4;
/// The bit of RFLAGS that always reads as 1.
const RFLAGS_FIXED: u64 = 1 << 1;
/// Segment types (Intel SDM Vol. 3, §3.4.5.1 and §3.5).
const CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;
const DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const TSS_32_BUSY: u8 = 0xb;
/// Selectors (Linux boot protocol: __BOOT_CS and __BOOT_DS).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Guest-physical address of the segment descriptors.
const GDT_START: u64 = 0x500;
/// The descriptors of what [`StartState::set_sregs`] loads; the task-state segment is not reloaded.
const GDT: [u64; 4] =
    [0, 0, flat_descriptor(CODE_EXECUTE_READ_ACCESSED), flat_descriptor(DATA_READ_WRITE_ACCESSED)];

/// Registers of the first vCPU that depend on the boot protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartState {
    /// Where it starts.
    pub rip: u64,
    /// The protocol's magic number, if it is passed here.
    pub rax: u64,
    /// Guest-physical address of the boot information.
    pub rbx: u64,
    /// The same, for protocols that pass it here.
    pub rsi: u64,
}

impl StartState {
    /// General registers.
    pub fn regs(&self) -> kvm_regs {
        kvm_regs {
            rip: self.rip,
            rax: self.rax,
            rbx: self.rbx,
            rsi: self.rsi,
            rflags: RFLAGS_FIXED,
            ..kvm_regs::default()
        }
    }

    /// Updates the special registers `sregs` of a vCPU after reset.
    pub fn set_sregs(&self, sregs: &mut kvm_sregs) {
        let code = flat(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED);
        let data = flat(DATA_SELECTOR, DATA_READ_WRITE_ACCESSED);
        sregs.cs = code;
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = data;
        }
        sregs.tr = kvm_segment {
            base: 0,
            limit: 0x67,
            selector: TSS_SELECTOR,
            type_: TSS_32_BUSY,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.gdt.base = GDT_START;
        sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
}

/// Writes the segment descriptors.
pub(super) fn write_gdt(memory: &MachineMemory) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    memory.map().write_slice(&bytes, GuestAddress(GDT_START))
}

/// The descriptor of a 32-bit segment of 4 GiB from 0 (Intel SDM Vol. 3, §3.4.5).
const fn flat_descriptor(type_: u8) -> u64 {
    const LIMIT: u64 = 0xf << 48 | 0xffff;
    const CODE_OR_DATA: u64 = 1 << 44;
    const PRESENT: u64 = 1 << 47;
    const DEFAULT_32_BITS: u64 = 1 << 54;
    const GRANULARITY_4K: u64 = 1 << 55;
    LIMIT | (type_ as u64) << 40 | CODE_OR_DATA | PRESENT | DEFAULT_32_BITS | GRANULARITY_4K
}

/// A 32-bit segment of 4 GiB from 0.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paging_is_off_and_segments_are_flat() {
        let mut sregs = kvm_sregs { cr0: 0x8000_0010, efer: 0x500, ..kvm_sregs::default() };
        let state = StartState { rip: 0x10_0000, rax: 1, rbx: 2, rsi: 3 };
        state.set_sregs(&mut sregs);
        assert_eq!(sregs.cr0, 0x11);
        assert_eq!(sregs.efer, 0);
        assert_eq!(
            (sregs.cs.base, sregs.cs.limit, sregs.cs.l, sregs.cs.db),
            (0, 0xffff_ffff, 0, 1)
        );
        assert_eq!(state.regs().rip, 0x10_0000);
        assert_eq!(state.regs().rsi, 3);
    }

    #[test]
    fn the_descriptors_describe_what_is_loaded() {
        // As a PC's boot loaders write them, with the accessed bit set.
        assert_eq!(GDT, [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
        let mut sregs = kvm_sregs::default();
        StartState { rip: 0, rax: 0, rbx: 0, rsi: 0 }.set_sregs(&mut sregs);
        assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
        assert_eq!(sregs.gdt.limit, 31);
        let memory = MachineMemory::new(0x1000).unwrap();
        write_gdt(&memory).unwrap();
        let code: u64 = memory.map().read_obj(GuestAddress(sregs.gdt.base + 0x10)).unwrap();
        assert_eq!(code, GDT[2]);
    }
}
