// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state the first vCPU starts in: 32-bit protected mode, flat segments, paging off.
//!
//! PVH and Multiboot ask for the same but for two registers.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

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

/// Registers of the first vCPU that depend on what it boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartState {
    /// Where it starts.
    pub rip: u64,
    /// The protocol's magic number, for those that have one here.
    pub rax: u64,
    /// Guest-physical address of what the kernel is told.
    pub rbx: u64,
}

impl StartState {
    /// General registers.
    pub fn regs(&self) -> kvm_regs {
        kvm_regs {
            rip: self.rip,
            rax: self.rax,
            rbx: self.rbx,
            rflags: RFLAGS_FIXED,
            ..kvm_regs::default()
        }
    }

    /// Changes the special registers `sregs` of a vCPU after reset.
    pub fn set_sregs(&self, sregs: &mut kvm_sregs) {
        let code = flat(0x08, CODE_EXECUTE_READ_ACCESSED);
        let data = flat(0x10, DATA_READ_WRITE_ACCESSED);
        sregs.cs = code;
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = data;
        }
        sregs.tr = kvm_segment {
            base: 0,
            limit: 0x67,
            selector: 0x18,
            type_: TSS_32_BUSY,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.gdt.base = 0;
        sregs.gdt.limit = 0;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
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
        let state = StartState { rip: 0x10_0000, rax: 1, rbx: 2 };
        state.set_sregs(&mut sregs);
        assert_eq!(sregs.cr0, 0x11);
        assert_eq!(sregs.efer, 0);
        assert_eq!(
            (sregs.cs.base, sregs.cs.limit, sregs.cs.l, sregs.cs.db),
            (0, 0xffff_ffff, 0, 1)
        );
        assert_eq!(state.regs().rip, 0x10_0000);
    }
}
