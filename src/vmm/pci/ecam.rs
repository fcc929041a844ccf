// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space as memory: 4 KiB a function (ECAM, §7.2.2).

use std::sync::Arc;

use super::layout::CONFIG_SIZE;
use super::PciBus;
use crate::bus::BusDevice;
use twostage::spec::pci::Bdf;

/// The ECAM window.
#[derive(Debug)]
pub struct Ecam(pub Arc<PciBus>);

/// The function and the register at `offset` of the window.
fn decode(offset: u64) -> (Bdf, u16) {
    // At most 256 buses of 1 MiB: bits 27:12 are the function, so both casts are lossless.
    let bdf = Bdf::from_raw((offset / CONFIG_SIZE as u64) as u16);
    (bdf, (offset % CONFIG_SIZE as u64) as u16)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bdf, register) = decode(offset);
        self.0.read_config(bdf, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bdf, register) = decode(offset);
        self.0.write_config(bdf, register, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_names_function_and_register() {
        assert_eq!(decode(0x0000_8104), (Bdf::new(0, 1, 0).unwrap(), 0x104));
        assert_eq!(decode(0x0fff_fffc), (Bdf::new(0xff, 0x1f, 7).unwrap(), 0xffc));
    }
}
