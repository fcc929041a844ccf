// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to the interrupt address range: all are messages, however they are made.

use std::fmt;
use std::sync::Arc;

use super::{DmaError, DmaMaster};
use crate::arch::layout::MESSAGE_RANGE;
use twostage::spec::pci::Pasid;
use twostage::viommu::InterruptSink;

/// Memory access with the interrupt range in front: a dword write there is sent as a message, any
/// other access there is refused.
pub struct MessageWrites {
    memory: Box<dyn DmaMaster>,
    messages: Arc<dyn InterruptSink>,
}

impl MessageWrites {
    /// `memory`, with the interrupt range routed to `messages`.
    pub fn new(memory: Box<dyn DmaMaster>, messages: Arc<dyn InterruptSink>) -> Self {
        Self { memory, messages }
    }
}

impl fmt::Debug for MessageWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageWrites").finish_non_exhaustive()
    }
}

fn is_interrupt(pasid: Option<Pasid>, iova: u64) -> bool {
    pasid.is_none() && MESSAGE_RANGE.contains(&iova)
}

impl DmaMaster for MessageWrites {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        if is_interrupt(pasid, iova) {
            return Err(DmaError { address: iova });
        }
        self.memory.read(pasid, iova, data)
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        if !is_interrupt(pasid, iova) {
            return self.memory.write(pasid, iova, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(message) if iova.is_multiple_of(4) => {
                self.messages.send_msi(iova, u32::from_le_bytes(message));
                Ok(())
            }
            _ => Err(DmaError { address: iova }),
        }
    }
}

#[cfg(test)]
mod tests {
    use twostage::sync::Mutex;

    use super::*;

    /// Takes every request.
    struct Everything;

    impl DmaMaster for Everything {
        fn read(&mut self, _: Option<Pasid>, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
            Ok(())
        }

        fn write(&mut self, _: Option<Pasid>, _: u64, _: &[u8]) -> Result<(), DmaError> {
            Ok(())
        }
    }

    #[derive(Default)]
    struct Messages(Mutex<Vec<(u64, u32)>>);

    impl InterruptSink for Messages {
        fn send_msi(&self, address: u64, data: u32) {
            self.0.lock().push((address, data));
        }
    }

    #[test]
    fn a_dword_to_the_interrupt_range_is_a_message_and_nothing_else_there_is_done() {
        let messages = Arc::new(Messages::default());
        let mut dma = MessageWrites::new(Box::new(Everything), messages.clone());
        dma.write(None, 0xfee0_1000, &[0x21, 0, 0, 0]).unwrap();
        assert_eq!(*messages.0.lock(), [(0xfee0_1000, 0x21)]);

        assert!(dma.write(None, 0xfee0_0000, &[0; 8]).is_err());
        assert!(dma.write(None, 0xfee0_0002, &[0; 4]).is_err());
        assert!(dma.read(None, 0xfeef_fffc, &mut [0; 4]).is_err());
        dma.write(Pasid::new(1), 0xfee0_0000, &[0; 4]).unwrap();
        dma.write(None, 0xfedf_fffc, &[0; 4]).unwrap();
        dma.write(None, 0xfef0_0000, &[0; 4]).unwrap();
        assert_eq!(messages.0.lock().len(), 1);
    }
}
