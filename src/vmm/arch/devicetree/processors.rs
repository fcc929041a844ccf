// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processors, their start method and their timers: `arm,psci-1.0`, `arm,armv8-timer`.

use vm_fdt::{Error, FdtWriter};

use super::interrupts::private;

/// Private interrupts of the architecture's timers: EL1 secure and non-secure, virtual, EL2.
const TIMERS: [u32; 4] = [13, 14, 11, 10];

/// MPIDR_EL1 of the processor `id` in KVM: sixteen in a cluster, clusters above.
fn affinity(id: u8) -> u32 {
    let id = u32::from(id);
    id >> 4 << 8 | id & 0xf
}

/// `cpus`, `psci` and `timer`.
pub(super) fn nodes(fdt: &mut FdtWriter, vcpus: u8) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for affinity in (0..vcpus).map(affinity) {
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", affinity)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)?;

    let psci = fdt.begin_node("psci")?;
    let compatible = ["arm,psci-1.0", "arm,psci-0.2"].map(str::to_owned);
    fdt.property_string_list("compatible", compatible.into())?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(psci)?;

    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &TIMERS.map(private).concat())?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_have_sixteen_processors() {
        assert_eq!([0, 15, 16, 254].map(affinity), [0, 0xf, 0x100, 0xf0e]);
    }
}
