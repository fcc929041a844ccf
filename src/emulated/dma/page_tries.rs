// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a device keeps requesting a page.

use crate::dma::error::DmaError;
use twostage::iommufd::PageResponseCode;

/// How often a transfer requests the page at the same address.
const MAX_TRIES: u32 = 16;

/// The page requests of one transfer: it fails when a page is refused, or when responses repeatedly
/// claim success for a page that stays missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageTries {
    /// The last requested address, and how often.
    address: u64,
    count: u32,
}

impl PageTries {
    /// The request for the page at `address` got `response`. The transfer is to be retried from
    /// there.
    ///
    /// # Errors
    /// [`DmaError::PageRefused`]: it is not.
    pub fn answered(&mut self, address: u64, response: PageResponseCode) -> Result<(), DmaError> {
        let count = if address == self.address { self.count } else { 0 };
        *self = Self { address, count: count + 1 };
        if response == PageResponseCode::Success && self.count < MAX_TRIES {
            return Ok(());
        }
        Err(DmaError::PageRefused { address, response })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gives_up_on_a_page_and_not_on_a_transfer() {
        let mut tries = PageTries::default();
        let response = PageResponseCode::Success;
        for address in 0..100 {
            for _ in 1..MAX_TRIES {
                assert_eq!(tries.answered(address, response), Ok(()));
            }
        }
        assert_eq!(
            tries.answered(99, response),
            Err(DmaError::PageRefused { address: 99, response })
        );
        let response = PageResponseCode::Invalid;
        let refused = PageTries::default().answered(0, response);
        assert_eq!(refused, Err(DmaError::PageRefused { address: 0, response }));
    }
}
