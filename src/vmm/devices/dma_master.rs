// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How an emulated device makes memory requests.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::MachineMemory;
use twostage::spec::pci::Pasid;

/// A refused request: the IOMMU blocked and reported it, or nothing answers at the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("DMA at {address:#x} was refused")]
pub struct DmaError {
    /// The IOVA of the request, in bytes.
    pub address: u64,
}

/// Makes memory requests on behalf of one function.
///
/// A request lies in one 4 KiB page, as on PCI Express (PCIe 6.0 §2.2.7), and is done completely or
/// not at all.
pub trait DmaMaster: Send {
    /// Fills `data` from `iova`, with `pasid` on the request if given.
    ///
    /// # Errors
    /// The request was refused; the contents of `data` are unspecified.
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError>;

    /// Writes `data` to `iova`, with `pasid` on the request if given.
    ///
    /// # Errors
    /// The request was refused; memory is unchanged.
    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError>;
}

/// Guest memory without an IOMMU in between: the IOVA is the GPA.
#[derive(Debug)]
pub struct DirectMemory(pub MachineMemory);

impl DirectMemory {
    fn check(&self, pasid: Option<Pasid>, iova: u64, length: usize) -> Result<(), DmaError> {
        // Without an IOMMU, a PASID has no meaning.
        if pasid.is_some() || !self.0.contains(iova, length as u64) {
            return Err(DmaError { address: iova });
        }
        Ok(())
    }
}

impl DmaMaster for DirectMemory {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        self.check(pasid, iova, data.len())?;
        self.0.map().read_slice(data, GuestAddress(iova)).map_err(|_| DmaError { address: iova })
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        self.check(pasid, iova, data.len())?;
        self.0.map().write_slice(data, GuestAddress(iova)).map_err(|_| DmaError { address: iova })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_memory_is_refused_as_a_whole() {
        let mut memory = DirectMemory(MachineMemory::new(0x2000).unwrap());
        memory.write(None, 0x1000, &[1, 2, 3, 4]).unwrap();
        let mut data = [0; 4];
        memory.read(None, 0x1000, &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 4]);
        let error = memory.write(None, 0x1ffe, &[9; 4]).unwrap_err();
        assert_eq!(error, DmaError { address: 0x1ffe });
        memory.read(None, 0x1ffc, &mut data).unwrap();
        assert_eq!(data, [0; 4]);
        assert!(memory.read(Pasid::new(1), 0x1000, &mut data).is_err());
        assert!(memory.read(None, u64::MAX, &mut data).is_err());
    }
}
