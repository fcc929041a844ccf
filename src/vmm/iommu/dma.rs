// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A DMA port of the emulated host, as a device uses it to reach memory.

use crate::devices::{DmaError, DmaMaster};
use twostage::spec::pci::Pasid;
use twostage_emulated::{DmaAttributes, DmaPort};

impl DmaMaster for DmaPort {
    fn read(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &mut [u8],
    ) -> std::result::Result<(), DmaError> {
        DmaPort::read(self, attributes(pasid), iova, data).map_err(|_| DmaError { address: iova })
    }

    fn write(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &[u8],
    ) -> std::result::Result<(), DmaError> {
        DmaPort::write(self, attributes(pasid), iova, data).map_err(|_| DmaError { address: iova })
    }
}

/// The attributes of a request with `pasid`.
pub(super) fn attributes(pasid: Option<Pasid>) -> DmaAttributes {
    DmaAttributes { pasid: pasid.map(Pasid::raw), ..DmaAttributes::default() }
}
