// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! CPUID of a vCPU.
//!
//! Based on what KVM supports on this host, except what depends on the machine: which vCPU this is,
//! how many there are (all of them cores of one package, with one thread each), and that there is a
//! hypervisor.
//!
//! Source: Intel SDM Vol. 2 (CPUID) and AMD APM Vol. 3, appendix E; the leaf numbers are theirs.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};

/// Leaf 1, ECX: there is a hypervisor, whose leaves start at 0x4000_0000.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the LAPIC timer has a deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, EDX: the number of APIC IDs in EBX is valid.
const MULTIPLE_APIC_IDS: u32 = 1 << 28;
/// Level types of leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A vCPU among those of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VcpuIdentity {
    /// Its APIC ID.
    pub id: u8,
    /// Number of vCPUs.
    pub count: u8,
}

impl VcpuIdentity {
    /// Bits of an APIC ID that identify the core.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

/// Turns `cpuid`, as supported by KVM, into that of a vCPU. `tsc_deadline` says whether KVM's
/// LAPICs have deadline mode, which older kernels do not report.
pub(super) fn set_identity(cpuid: &mut CpuId, vcpu: VcpuIdentity, tsc_deadline: bool) {
    let (id, count) = (u32::from(vcpu.id), u32::from(vcpu.count));
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
                entry.ecx |= HYPERVISOR;
                set_bit(&mut entry.ecx, TSC_DEADLINE, tsc_deadline);
                set_bit(&mut entry.edx, MULTIPLE_APIC_IDS, count > 1);
            }
            // Caches, at each level: level 3 is shared by all, the others belong to a core.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0b111;
                let sharing = if level < 3 { 0 } else { (1 << vcpu.core_bits()) - 1 };
                let cores = ((1 << vcpu.core_bits()) - 1).min(0x3f);
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
            }
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xf0ff | vcpu.core_bits() << 12 | (count - 1);
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0b111;
                let sharing = if level < 3 { 0 } else { count - 1 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            // Extended APIC id; core id with one thread a core; node 0 of one.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
    for leaf in [0xb, 0x1f] {
        set_topology(cpuid, leaf, vcpu);
    }
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

/// Rewrites an extended topology leaf, if it exists.
fn set_topology(cpuid: &mut CpuId, leaf: u32, vcpu: VcpuIdentity) {
    if !cpuid.as_slice().iter().any(|entry| entry.function == leaf) {
        return;
    }
    cpuid.retain(|entry| entry.function != leaf);
    let levels = [
        // Shift to the next level's id, processors at this level, the level's type.
        (0, 1, LEVEL_THREAD),
        (vcpu.core_bits(), vcpu.count.into(), LEVEL_CORE),
        (0, 0, 0),
    ];
    for (index, (shift, processors, kind)) in (0..).zip(levels) {
        let entry = kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: vcpu.id.into(),
            ..kvm_cpuid_entry2::default()
        };
        if cpuid.push(entry).is_err() {
            // KVM's limit on entries, of which it uses a fraction.
            log::warn!("CPUID leaf {leaf:#x}: no room for level {index}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
        let mut leaves = cpuid.as_slice().iter();
        let entry = leaves.find(|entry| (entry.function, entry.index) == (function, index));
        let entry = entry.unwrap();
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn a_vcpu_knows_which_it_is_of_how_many() {
        let mut cpuid = CpuId::from_entries(&[
            entry(1, [0x663, 0xdead_0800, TSC_DEADLINE | 1, 0]),
            entry(4, [0xffff_c121, 1, 2, 3]),
            entry(4, [0xffff_c163, 1, 2, 3]),
            entry(0xb, [9; 4]),
            entry(0x8000_0008, [0x3028, 0, 0x7007, 0]),
            entry(0x8000_001e, [9; 4]),
        ])
        .unwrap();
        set_identity(&mut cpuid, VcpuIdentity { id: 2, count: 3 }, false);
        assert_eq!(leaf(&cpuid, 1, 0), [0x663, 0x0203_0800, HYPERVISOR | 1, MULTIPLE_APIC_IDS]);
        assert_eq!(leaf(&cpuid, 0xb, 0), [0, 1, 0x100, 2]);
        assert_eq!(leaf(&cpuid, 0xb, 1), [2, 3, 0x201, 2]);
        assert_eq!(leaf(&cpuid, 0xb, 2), [0, 0, 2, 2]);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0), [0x3028, 0, 0x2002, 0]);
        assert_eq!(leaf(&cpuid, 0x8000_001e, 0), [2, 2, 0, 9]);
        // Level 1 is a core's own; level 3 is shared by four APIC ids.
        let caches: Vec<_> =
            cpuid.as_slice().iter().filter(|e| e.function == 4).map(|e| e.eax).collect();
        assert_eq!(caches, [0x0c00_0121, 0x0c00_c163]);
        // A leaf that the processor lacks is not added.
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x1f));
    }

    #[test]
    fn the_deadline_timer_is_there_when_kvm_has_it() {
        let mut cpuid = CpuId::from_entries(&[entry(1, [0; 4])]).unwrap();
        set_identity(&mut cpuid, VcpuIdentity { id: 0, count: 1 }, true);
        assert_eq!(leaf(&cpuid, 1, 0), [0, 1 << 16, HYPERVISOR | TSC_DEADLINE, 0]);
    }
}
